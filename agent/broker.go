package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/agent/workloadattest/k8s"
	"github.com/signet-id/signet/internal/adminsocket"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/broker"
	"github.com/signet-id/signet/workloadapi/delegated"
)

// Broker configures the SPIFFE Broker Endpoint, an incubating part of the standard. Without SocketPath and Listen there is
// none.
type Broker struct {
	// SocketPath is where brokers find the Broker API. It has a directory of its own, not that of the Workload API or of the
	// admin socket. The agent's own user, root and SocketGroup may connect; each then shows its X509-SVID.
	SocketPath string `yaml:"socket_path"`
	// SocketGroup is a group, by name or number, whose members may connect to SocketPath.
	SocketGroup string `yaml:"socket_group"`
	// SocketUIDs are users, by number, who may connect to SocketPath.
	SocketUIDs []uint32 `yaml:"socket_uids"`
	// Listen serves the Broker API over TCP too, on host:port, such as 127.0.0.1:8083. Without a host it is the loopback
	// interface.
	Listen string `yaml:"listen"`
	// AllowOtherHosts allows an address that other hosts reach. They can name pods, never processes.
	AllowOtherHosts bool `yaml:"allow_other_hosts"`
	// Brokers are those who may call. There is no other way in.
	Brokers []BrokerClient `yaml:"brokers"`
	// MaxStreams bounds the open calls of one broker. Default 4096.
	MaxStreams int `yaml:"max_streams"`
	// DisableX509 and DisableJWT answer the calls of that profile with Unimplemented.
	DisableX509 bool `yaml:"disable_x509"`
	DisableJWT  bool `yaml:"disable_jwt"`
}

// BrokerClient is a program that may speak for workloads of this node.
type BrokerClient struct {
	// ID is the broker's SPIFFE ID, such as /node-proxy.
	ID string `yaml:"id"`
	// References are the ways in which it may name workloads: pid, kubernetes, or both.
	References []string `yaml:"references"`
	// Namespaces are those whose pods it may name. Empty: all.
	Namespaces []string `yaml:"namespaces"`
	// SPIFFEIDs are patterns of the IDs that it may get, such as /ns/shop/**. Empty: whatever the workload has.
	SPIFFEIDs []string `yaml:"spiffe_ids"`
	// Audiences are those that it may get JWT-SVIDs for. Empty: any.
	Audiences []string `yaml:"audiences"`
	// PIDOverLoopback lets it name processes over TCP too, if it connects from this host's loopback interface to it.
	PIDOverLoopback bool `yaml:"pid_over_loopback"`
}

func (b *Broker) enabled() bool { return b.SocketPath != "" || b.Listen != "" }

// check tells each mistake by its field.
func (b *Broker) check(c *Config, bad func(field, format string, args ...any)) {
	at := func(field, format string, args ...any) { bad("broker."+field, format, args...) }
	if !b.enabled() {
		if len(b.Brokers) > 0 || b.SocketGroup != "" || len(b.SocketUIDs) > 0 {
			at("socket_path", "missing; name a socket in a directory of its own, such as /run/signet-broker/broker.sock, or leave out broker")
		}
		return
	}
	if b.SocketPath != "" {
		b.checkSocket(c, at)
	}
	b.checkListen(at)
	if b.MaxStreams < 0 {
		at("max_streams", "%d is negative", b.MaxStreams)
	}
	if b.DisableX509 && b.DisableJWT {
		at("disable_jwt", "set beside disable_x509, so that nothing is left; leave out broker")
	}
	if len(b.Brokers) == 0 {
		at("brokers", "missing; list the SPIFFE IDs that may call, or leave out broker")
	}
	td := c.trustDomain()
	if td.IsZero() {
		return // which is said elsewhere
	}
	seen := map[spiffeid.ID]bool{}
	for i := range b.Brokers {
		field := fmt.Sprintf("brokers[%d].", i)
		client, err := b.Brokers[i].read(td)
		for _, err := range err {
			bad("broker."+field+err.field, "%s", err.text)
		}
		if slices.Contains(client.References, broker.Kubernetes) && c.WorkloadAttestation.K8s == nil {
			bad("broker."+field+"references", "%s needs workload_attestation.k8s, which knows the pods of this node", broker.Kubernetes)
		}
		if !client.ID.IsZero() && seen[client.ID] {
			bad("broker."+field+"id", "%q is there twice", client.ID)
		}
		seen[client.ID] = true
	}
}

func (b *Broker) checkSocket(c *Config, at func(field, format string, args ...any)) {
	switch own := filepath.Dir(b.SocketPath); {
	case !filepath.IsAbs(b.SocketPath):
		at("socket_path", "%q must be absolute", b.SocketPath)
	case len(b.SocketPath) > maxSocketBytes:
		at("socket_path", "%q has %d bytes, and a Unix socket's path at most %d; choose a shorter one", b.SocketPath, len(b.SocketPath), maxSocketBytes)
	case within(own, filepath.Dir(c.SocketPath)):
		at("socket_path", "%q is in %s, the directory of the Workload API, which every workload reaches; choose a directory of its own, such as /run/signet-broker",
			b.SocketPath, filepath.Dir(c.SocketPath))
	case c.AdminSocket.Path != "" && filepath.Clean(own) == filepath.Dir(c.AdminSocket.Path):
		at("socket_path", "%q is in the directory of the admin socket; choose a directory of its own, such as /run/signet-broker", b.SocketPath)
	}
	b.socket().Check(func(field, format string, args ...any) { at("socket_"+field, format, args...) })
}

func (b *Broker) checkListen(at func(field, format string, args ...any)) {
	if b.Listen == "" {
		return
	}
	host, port, err := net.SplitHostPort(b.Listen)
	if err != nil || port == "" {
		at("listen", "%q is not host:port, such as 127.0.0.1:8083", b.Listen)
		return
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		at("listen", "%q has no port of 0 to 65535", b.Listen)
		return
	}
	if host == "" {
		host = "127.0.0.1"
		b.Listen = net.JoinHostPort(host, port)
	}
	if ip := net.ParseIP(host); !b.AllowOtherHosts && (ip == nil && host != "localhost" || ip != nil && !ip.IsLoopback()) {
		at("listen", "%q is not on the loopback interface; set allow_other_hosts if other hosts shall reach it", b.Listen)
	}
}

func (b *Broker) socket() adminsocket.Config {
	return adminsocket.Config{Path: b.SocketPath, UIDs: b.SocketUIDs, Group: b.SocketGroup}
}

// A fieldError is a mistake in one field of a BrokerClient.
type fieldError struct{ field, text string }

// read returns the client as the endpoint wants it, and its mistakes.
func (b *BrokerClient) read(td spiffeid.TrustDomain) (client broker.Broker, mistakes []fieldError) {
	bad := func(field, format string, args ...any) {
		mistakes = append(mistakes, fieldError{field, fmt.Sprintf(format, args...)})
	}
	client = broker.Broker{Namespaces: b.Namespaces, Audiences: b.Audiences, PIDOverLoopback: b.PIDOverLoopback}
	id, err := ownID(td, b.ID)
	if err != nil {
		bad("id", "%v", err)
	}
	client.ID = id
	if len(b.References) == 0 {
		bad("references", "missing; allow %s, %s or both", broker.PID, broker.Kubernetes)
	}
	for _, r := range b.References {
		switch r := broker.ReferenceType(r); {
		case r != broker.PID && r != broker.Kubernetes:
			bad("references", "%q is not %s or %s", r, broker.PID, broker.Kubernetes)
		case !slices.Contains(client.References, r):
			client.References = append(client.References, r)
		}
	}
	for _, pattern := range b.SPIFFEIDs {
		full := inTrustDomain(td, pattern)
		if err := policy.CheckIDPattern(full); err != nil {
			bad("spiffe_ids", "%v", err)
		}
		client.IDs = append(client.IDs, full)
	}
	if slices.Contains(b.Audiences, "") {
		bad("audiences", "has an empty value; leave out audiences for any")
	}
	if slices.Contains(b.Namespaces, "") {
		bad("namespaces", "has an empty value; leave out namespaces for all")
	}
	if len(b.Namespaces) > 0 && !slices.Contains(client.References, broker.Kubernetes) {
		bad("namespaces", "set, but references do not have %s", broker.Kubernetes)
	}
	if b.PIDOverLoopback && !slices.Contains(client.References, broker.PID) {
		bad("pid_over_loopback", "set, but references do not have %s", broker.PID)
	}
	return client, mistakes
}

// podsOf returns what knows the pods of this node, or nil.
func podsOf(methods []workloadattest.Method) broker.Pods {
	for _, m := range methods {
		if m, ok := m.(*k8s.Method); ok {
			return kubeletPods{m}
		}
	}
	return nil
}

// kubeletPods are the pods that the kubelet has, as the Broker Endpoint wants them.
type kubeletPods struct{ method *k8s.Method }

func (k kubeletPods) Pod(ctx context.Context, ref broker.PodReference) (broker.Pod, error) {
	pod, err := k.method.Pod(ctx, k8s.Reference(ref))
	switch {
	case errors.Is(err, k8s.ErrNotFound), errors.Is(err, k8s.ErrMismatch):
		return broker.Pod{}, fmt.Errorf("%w: %w", broker.ErrNoPod, err)
	case err != nil && pod.UID == "":
		return broker.Pod{}, err
	}
	// An error beside a pod is about a part of its selectors.
	return broker.Pod{UID: pod.UID, Selectors: pod.Selectors, Incomplete: err != nil}, nil
}

// inTrustDomain writes an ID or a pattern in full: one that begins with a slash is of the own trust domain.
func inTrustDomain(td spiffeid.TrustDomain, s string) string {
	if strings.HasPrefix(s, "/") {
		return td.IDString() + s
	}
	return s
}

// ownID reads the SPIFFE ID of a workload of the own trust domain.
func ownID(td spiffeid.TrustDomain, s string) (spiffeid.ID, error) {
	if s == "" {
		return spiffeid.ID{}, errors.New("missing; give a SPIFFE ID of this trust domain, such as /node-proxy")
	}
	id, err := spiffe.ParseWorkloadID(inTrustDomain(td, s))
	if err != nil {
		return spiffeid.ID{}, err
	}
	if !id.MemberOf(td) {
		return spiffeid.ID{}, fmt.Errorf("%q is not in trust domain %q", id, td.Name())
	}
	return id, nil
}

// openBroker makes the Broker Endpoint, if it is configured.
func (a *Agent) openBroker() error {
	c := &a.config.Broker
	if !c.enabled() {
		return nil
	}
	cfg := broker.Config{
		TrustDomain: a.config.trustDomain(), Source: a.cache, Attestor: a.attestor, Pods: a.pods, SVID: a.node.identity, Bundles: a.node,
		DisableX509: c.DisableX509, DisableJWT: c.DisableJWT, MaxStreams: c.MaxStreams, Log: a.log, Now: a.config.Now,
		OnCall: a.metrics.call, OnPush: a.metrics.push,
	}
	for i := range c.Brokers {
		client, _ := c.Brokers[i].read(cfg.TrustDomain) // Check has seen the mistakes
		cfg.Brokers = append(cfg.Brokers, client)
	}
	var err error
	closeAll := func() {
		for _, l := range cfg.Listeners {
			l.Close()
		}
	}
	listen := func(field string, l net.Listener, err error) error {
		if err != nil {
			closeAll()
			return fmt.Errorf("broker.%s: %w", field, err)
		}
		cfg.Listeners = append(cfg.Listeners, l)
		return nil
	}
	if c.SocketPath != "" {
		l, err := adminsocket.Listen(c.socket())
		if err := listen("socket_path", l, err); err != nil {
			return err
		}
	}
	if c.Listen != "" {
		l, err := net.Listen("tcp", c.Listen)
		if err := listen("listen", l, err); err != nil {
			return err
		}
		a.brokerAddr = l.Addr()
	}
	cfg.Executables = a.config.Executables
	if a.broker, err = broker.New(cfg); err != nil {
		closeAll()
		return fmt.Errorf("broker: %w", err)
	}
	a.log.Info("the Broker Endpoint speaks for this node's workloads", "socket", c.SocketPath, "listen", c.Listen, "brokers", len(cfg.Brokers))
	return nil
}

// BrokerAddr is where the Broker API is served over TCP, or nil.
func (a *Agent) BrokerAddr() net.Addr { return a.brokerAddr }

// openDelegated returns what the admin socket serves to authorised delegates, if there are any.
func (a *Agent) openDelegated() ([]func(grpc.ServiceRegistrar), error) {
	c := &a.config.AdminSocket
	if len(c.AuthorizedDelegates) == 0 {
		return nil, nil
	}
	cfg := delegated.Config{Source: a.cache, Attestor: a.attestor, Log: a.log, OnCall: a.metrics.call, OnPush: a.metrics.push}
	for _, s := range c.AuthorizedDelegates {
		id, err := ownID(a.config.trustDomain(), s)
		if err != nil {
			return nil, fmt.Errorf("admin_socket.authorized_delegates: %w", err)
		}
		cfg.Delegates = append(cfg.Delegates, id)
	}
	var err error
	cfg.Executables = a.config.Executables
	if a.delegated, err = delegated.New(cfg); err != nil {
		return nil, fmt.Errorf("admin_socket.authorized_delegates: %w", err)
	}
	return []func(grpc.ServiceRegistrar){a.delegated.Register}, nil
}
