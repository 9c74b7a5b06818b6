package inject

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/signet-id/signet/spiffe"
)

// Label opts a pod in, with the value "true". Annotations that begin with prefix say what its proxy does.
const (
	Label  = "signet-id.github.io/inject"
	prefix = "signet-id.github.io/inject-"

	annotationInbound  = prefix + "inbound"
	annotationOutbound = prefix + "outbound"
	annotationService  = prefix + "service"
	annotationID       = prefix + "spiffe-id"
	annotationSocket   = prefix + "socket"
	annotationStatus   = prefix + "status-port"
	annotationRequests = prefix + "requests"
	annotationLimits   = prefix + "limits"
)

// Bounds of what one pod may ask for.
const (
	maxListeners   = 32
	maxServers     = 64
	maxValueBytes  = 8 << 10
	lowestPort     = 1
	defaultStatus  = 15090
	loopback       = "127.0.0.1"
	protocolTCP    = "tcp"
	protocolHTTP   = "http"
	protocolH2C    = "h2c"
	volumeCSI      = "csi"
	volumeHostPath = "hostPath"
)

// A wish is what the annotations of a pod ask for, checked.
type wish struct {
	inbound           []inbound
	outbound          []outbound
	volume            string
	statusPort        int
	requests, limits  corev1.ResourceList
	inboundPortsTaken map[int]string
}

// inbound and outbound are listeners as the proxy's configuration has them.
type inbound struct {
	Name     string       `json:"name"`
	Listen   string       `json:"listen"`
	Service  string       `json:"service"`
	Protocol string       `json:"protocol"`
	Backend  string       `json:"backend"`
	HTTP     *inboundHTTP `json:"http,omitempty"`

	port int
}

type inboundHTTP struct {
	BackendProtocol string `json:"backend_protocol"`
}

type outbound struct {
	Name     string   `json:"name"`
	Listen   string   `json:"listen"`
	Protocol string   `json:"protocol"`
	Address  string   `json:"address"`
	Servers  []string `json:"servers"`
	ID       string   `json:"spiffe_id,omitempty"`
}

// A mistake is what is wrong with an annotation, and how to mend it.
type mistake struct{ annotation, value, problem string }

func (m *mistake) Error() string {
	return fmt.Sprintf("annotation %s: %q: %s", m.annotation, clip(m.value), m.problem)
}

func clip(text string) string {
	const most = 128
	if len(text) > most {
		return strings.ToValidUTF8(text[:most], "") + "..."
	}
	return text
}

// read reads the annotations of a pod that has the label. Its namespace and service account make up the service's ID where
// none is given.
func read(annotations map[string]string, namespace, serviceAccount string, o Options) (*wish, error) {
	w := &wish{volume: o.Volume, statusPort: defaultStatus, inboundPortsTaken: map[int]string{}}
	for key, value := range annotations {
		if !strings.HasPrefix(key, prefix) {
			continue
		}
		if !slices.Contains(known, key) {
			return nil, &mistake{key, value, "there is no such annotation; these are known: " + strings.Join(known, ", ")}
		}
		if len(value) > maxValueBytes {
			return nil, &mistake{key, value, fmt.Sprintf("has %d bytes, %d at most", len(value), maxValueBytes)}
		}
	}
	if v, ok := annotations[annotationStatus]; ok {
		port, err := readPort(v)
		if err != nil {
			return nil, &mistake{annotationStatus, v, err.Error()}
		}
		w.statusPort = port
	}
	w.inboundPortsTaken[w.statusPort] = annotationStatus
	if v, ok := annotations[annotationSocket]; ok {
		if v != volumeCSI && v != volumeHostPath {
			return nil, &mistake{annotationSocket, v, fmt.Sprintf("is neither %s nor %s", volumeHostPath, volumeCSI)}
		}
		w.volume = v
	}
	if err := w.readListeners(annotations, namespace, serviceAccount, o.TrustDomain); err != nil {
		return nil, err
	}
	return w, w.readResources(annotations)
}

// readListeners reads what comes in and what goes out, and as whom.
func (w *wish) readListeners(annotations map[string]string, namespace, serviceAccount string, td spiffeid.TrustDomain) error {
	bad := func(key, format string, args ...any) error {
		return &mistake{key, annotations[key], fmt.Sprintf(format, args...)}
	}
	id := func(key, text string) (string, error) {
		if strings.HasPrefix(text, "/") {
			text = td.IDString() + text
		}
		parsed, err := spiffe.ParseWorkloadID(text)
		if err != nil || strings.Contains(text, "$") {
			return "", bad(key, "%q is not a SPIFFE ID, such as /ns/shop/sa/web or spiffe://partner.example/web", clip(text))
		}
		return parsed.String(), nil
	}
	ids := map[string]string{} // what the annotations of one ID say
	if made, err := spiffeid.FromSegments(td, "ns", namespace, "sa", serviceAccount); err == nil {
		ids[annotationService] = made.String()
	}
	for _, key := range []string{annotationService, annotationID} {
		if v, ok := annotations[key]; ok {
			var err error
			if ids[key], err = id(key, v); err != nil {
				return err
			}
		}
	}
	for i, item := range items(annotations[annotationInbound]) {
		in, err := readInbound(item)
		if err != nil {
			return bad(annotationInbound, "%v; write LISTEN=[http:|h2c:]PORT, such as 8443=http:8080", err)
		}
		if ids[annotationService] == "" {
			return bad(annotationInbound, "set %s to the SPIFFE ID of the service, which cannot be made from namespace and service account", annotationService)
		}
		if err := w.take(in.port, annotationInbound); err != nil {
			return bad(annotationInbound, "%v", err)
		}
		in.Name, in.Service = fmt.Sprintf("in-%d", i), ids[annotationService]
		w.inbound = append(w.inbound, in)
	}
	for i, item := range items(annotations[annotationOutbound]) {
		out, port, err := readOutbound(item, func(text string) (string, error) { return id(annotationOutbound, text) })
		if err != nil {
			if m, ok := err.(*mistake); ok {
				return m
			}
			return bad(annotationOutbound, "%v; write PORT=[http:]HOST:PORT SPIFFE-ID..., such as 15001=documents.shop.svc:8443 /ns/shop/sa/documents", err)
		}
		if err := w.take(port, annotationOutbound); err != nil {
			return bad(annotationOutbound, "%v", err)
		}
		out.Name, out.ID = fmt.Sprintf("out-%d", i), ids[annotationID]
		w.outbound = append(w.outbound, out)
	}
	switch n := len(w.inbound) + len(w.outbound); {
	case n == 0:
		return fmt.Errorf("label %s is set, and neither annotation %s nor %s says what the proxy is to do; set one, such as %s: 8443=http:8080", Label, annotationInbound, annotationOutbound, annotationInbound)
	case n > maxListeners:
		return fmt.Errorf("annotations %s and %s: %d listeners, %d at most", annotationInbound, annotationOutbound, n, maxListeners)
	}
	return nil
}

// readResources reads what the proxy's container asks for and may take.
func (w *wish) readResources(annotations map[string]string) (err error) {
	if w.requests, err = readResources(annotationRequests, annotations, "cpu=10m,memory=32Mi"); err != nil {
		return err
	}
	if w.limits, err = readResources(annotationLimits, annotations, "memory=128Mi"); err != nil {
		return err
	}
	for name, q := range w.requests {
		if l, ok := w.limits[name]; ok && q.Cmp(l) > 0 {
			return &mistake{annotationRequests, annotations[annotationRequests], fmt.Sprintf("asks for more %s than the limit, %s", name, l.String())}
		}
	}
	return nil
}

var known = []string{annotationInbound, annotationOutbound, annotationService, annotationID, annotationSocket, annotationStatus, annotationRequests, annotationLimits}

// take notes that a port of the pod is used, once.
func (w *wish) take(port int, by string) error {
	if other := w.inboundPortsTaken[port]; other != "" {
		return fmt.Errorf("port %d is taken by %s already", port, other)
	}
	w.inboundPortsTaken[port] = by
	return nil
}

// items are the parts of a value, one a line or separated by semicolons.
func items(value string) []string {
	var out []string
	for _, item := range strings.FieldsFunc(value, func(r rune) bool { return r == ';' || r == '\n' }) {
		if item = strings.TrimSpace(item); item != "" {
			out = append(out, item)
		}
	}
	return out
}

func readPort(text string) (int, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n < lowestPort || strings.HasPrefix(text, "+") {
		return 0, fmt.Errorf("%q is not a port of 1 to 65535", clip(text))
	}
	return int(n), nil
}

func readInbound(item string) (in inbound, err error) {
	listen, backend, ok := strings.Cut(item, "=")
	if !ok {
		return in, fmt.Errorf("%q has no =", clip(item))
	}
	if in.port, err = readPort(strings.TrimSpace(listen)); err != nil {
		return in, err
	}
	in.Protocol = protocolTCP
	protocol, port, named := strings.Cut(strings.TrimSpace(backend), ":")
	if !named {
		protocol, port = protocolTCP, protocol
	}
	switch protocol {
	case protocolTCP:
	case protocolHTTP:
		in.Protocol = protocolHTTP
	case protocolH2C:
		in.Protocol, in.HTTP = protocolHTTP, &inboundHTTP{BackendProtocol: protocolH2C}
	default:
		return in, fmt.Errorf("%q is not %s, %s or %s", clip(protocol), protocolTCP, protocolHTTP, protocolH2C)
	}
	to, err := readPort(port)
	if err != nil {
		return in, err
	}
	if to == in.port {
		return in, fmt.Errorf("the proxy and the program cannot both listen on port %d", to)
	}
	in.Listen, in.Backend = fmt.Sprintf(":%d", in.port), net.JoinHostPort(loopback, strconv.Itoa(to))
	return in, nil
}

func readOutbound(item string, id func(string) (string, error)) (out outbound, port int, err error) {
	words := strings.Fields(item)
	listen, address, ok := strings.Cut(words[0], "=")
	if !ok {
		return out, 0, fmt.Errorf("%q has no =", clip(item))
	}
	if port, err = readPort(listen); err != nil {
		return out, 0, err
	}
	out.Protocol = protocolTCP
	if rest, ok := strings.CutPrefix(address, protocolHTTP+":"); ok {
		out.Protocol, address = protocolHTTP, rest
	}
	host, to, err := net.SplitHostPort(address)
	if err != nil || host == "" || strings.ContainsFunc(host, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_' || r == ':')
	}) {
		return out, 0, fmt.Errorf("%q is not HOST:PORT", clip(address))
	}
	if _, err := readPort(to); err != nil {
		return out, 0, err
	}
	if len(words) == 1 {
		return out, 0, fmt.Errorf("%q names no SPIFFE ID that the server may have", clip(item))
	}
	if len(words)-1 > maxServers {
		return out, 0, fmt.Errorf("%d SPIFFE IDs of servers, %d at most", len(words)-1, maxServers)
	}
	for _, text := range words[1:] {
		server, err := id(text)
		if err != nil {
			return out, 0, err
		}
		out.Servers = append(out.Servers, server)
	}
	out.Listen, out.Address = net.JoinHostPort(loopback, strconv.Itoa(port)), address
	return out, port, nil
}

// readResources reads cpu=10m,memory=32Mi.
func readResources(key string, annotations map[string]string, otherwise string) (corev1.ResourceList, error) {
	value, ok := annotations[key]
	if !ok {
		value = otherwise
	}
	list := corev1.ResourceList{}
	for _, part := range strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == ' ' }) {
		name, text, _ := strings.Cut(part, "=")
		if name != string(corev1.ResourceCPU) && name != string(corev1.ResourceMemory) {
			return nil, &mistake{key, value, fmt.Sprintf("%q is not cpu=... or memory=...", clip(part))}
		}
		q, err := resource.ParseQuantity(text)
		if err != nil || q.Sign() <= 0 {
			return nil, &mistake{key, value, fmt.Sprintf("%q is not a quantity above zero, such as 10m of cpu or 32Mi of memory", clip(text))}
		}
		list[corev1.ResourceName(name)] = q
	}
	return list, nil
}
