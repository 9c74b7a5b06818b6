package inject

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/kube/follow/followtest"
	"github.com/signet-id/signet/ca/store/bolt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.org")

var options = Options{TrustDomain: td, Image: "example.test/signet-proxy:1", Volume: "hostPath", HostPath: "/run/signet/agent", SocketName: "agent.sock"}

// A webhook is a Server with real authorities, and a cluster that is not.
type webhook struct {
	t      *testing.T
	set    *authority.Set
	client *fake.Clientset
	server *Server
	ahead  atomic.Int64
	signed atomic.Int64
}

const dnsName = "signet-inject.signet-system.svc"

func start(t *testing.T) *webhook {
	t.Helper()
	return startWith(t, slog.New(slog.DiscardHandler), nil)
}

// startWith starts one that logs to log, after arrange has seen the cluster, if that is not nil.
func startWith(t *testing.T, log *slog.Logger, arrange func(*fake.Clientset)) *webhook {
	t.Helper()
	fail := admissionregistrationv1.Fail
	url := "https://example.test"
	w := &webhook{t: t, client: fake.NewClientset(&admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "signet-inject", ResourceVersion: "1"},
		Webhooks: []admissionregistrationv1.MutatingWebhook{{Name: "inject.signet-id.github.io", FailurePolicy: &fail, ClientConfig: admissionregistrationv1.WebhookClientConfig{URL: &url}}}})}
	now := func() time.Time { return time.Now().Add(time.Duration(w.ahead.Load())) }
	if arrange != nil {
		arrange(w.client)
	}
	store, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	seal, err := keys.CreateSealKey(filepath.Join(t.TempDir(), "seal.key"))
	if err != nil {
		t.Fatal(err)
	}
	if w.set, err = authority.Open(t.Context(), authority.Config{TrustDomain: td, Store: store, Seal: seal, Now: now, Log: log}); err != nil {
		t.Fatal(err)
	}
	revision, err := store.Barrier(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	watcher, err := store.Watch(t.Context(), revision)
	if err != nil {
		t.Fatal(err)
	}
	w.server, err = New(Config{Options: options, Cluster: "prod", Configurations: configurations{w.client.AdmissionregistrationV1().MutatingWebhookConfigurations(), new(followtest.Place)}, Namespace: "signet-system", Webhook: "signet-inject", Listen: "127.0.0.1:0",
		Sign: func(ctx context.Context, key crypto.PublicKey) (*authority.X509SVID, error) {
			w.signed.Add(1)
			p, err := w.set.CheckX509(authority.X509Request{ID: spiffeid.RequireFromPath(td, "/spire/signet/webhook/prod"), PublicKey: key, DNSNames: []string{dnsName}, Reserved: true})
			if err != nil {
				return nil, err
			}
			return w.set.SignX509(ctx, p)
		},
		Active: w.set.Pin, Roots: func() (out []*x509.Certificate) {
			for _, a := range w.set.Bundle().X509 {
				out = append(out, a.Certificate)
			}
			return out
		}, Now: now, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range []func(context.Context) error{w.server.Run, w.server.Lead} {
		running.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	running.Go(func() {
		for {
			b, err := watcher.Next(ctx)
			if err != nil {
				return
			}
			if err := w.set.Observe(b); err != nil {
				t.Error(err)
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
		watcher.Close()
	})
	return w
}

// caBundle is what API servers verify the webhook by at the moment.
func (w *webhook) caBundle() []byte {
	w.t.Helper()
	m, err := w.client.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(w.t.Context(), "signet-inject", metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return m.Webhooks[0].ClientConfig.CABundle
}

// post asks as an API server does: by a new connection, which it verifies by the caBundle.
func (w *webhook) post(bundle, body []byte, contentType string) (int, []byte, error) {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(bundle)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: dnsName}, DisableKeepAlives: true}
	client := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	resp, err := client.Post("https://"+w.server.Addr().String()+Path, contentType, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// review is the AdmissionReview for a pod as an API server writes it.
func review(t testing.TB, namespace string, pod *corev1.Pod) []byte {
	t.Helper()
	raw, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Appendf(nil, `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"0df28fbd","kind":{"group":"","version":"v1","kind":"Pod"},`+
		`"resource":{"group":"","version":"v1","resource":"pods"},"requestKind":{"group":"","version":"v1","kind":"Pod"},"requestResource":{"group":"","version":"v1","resource":"pods"},`+
		`"namespace":%q,"operation":"CREATE","userInfo":{"username":"system:serviceaccount:kube-system:replicaset-controller"},"object":%s,"oldObject":null,"dryRun":false,"options":{"kind":"CreateOptions","apiVersion":"meta.k8s.io/v1"}}}`,
		namespace, raw)
}

func podWith(annotations map[string]string) *corev1.Pod {
	return &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: metav1.ObjectMeta{GenerateName: "web-", Labels: map[string]string{Label: "true"}, Annotations: annotations},
		Spec: corev1.PodSpec{ServiceAccountName: "web", Containers: []corev1.Container{{Name: "app", Image: "example.test/app:1"}}}}
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	end := time.NewTimer(time.Minute)
	defer end.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-end.C:
			t.Fatalf("no %s within a minute", what)
		}
	}
}

// judge asks the webhook's judgement on a pod without the network.
func judge(t testing.TB, namespace string, pod *corev1.Pod) *admissionv1.AdmissionResponse {
	t.Helper()
	c := Config{Options: options, Namespace: "signet-system"}
	out, err := c.review(review(t, namespace, pod))
	if err != nil {
		t.Fatal(err)
	}
	var r admissionv1.AdmissionReview
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	if r.Response.UID != "0df28fbd" {
		t.Errorf("the answer is to %q", r.Response.UID)
	}
	return r.Response
}

// patched applies the webhook's patch to a pod.
func patched(t testing.TB, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	r := judge(t, "shop", pod)
	if !r.Allowed || r.Patch == nil {
		t.Fatalf("answer %+v, want a patch", r)
	}
	p, err := jsonpatch.DecodePatch(r.Patch)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	if raw, err = p.Apply(raw); err != nil {
		t.Fatal(err)
	}
	var out corev1.Pod
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	return &out
}

// TestInjects: the proxy comes first, as a native sidecar with no privilege, with the configuration that the annotations ask
// for; a second look at the pod changes nothing.
func TestInjects(t *testing.T) {
	pod := podWith(map[string]string{annotationInbound: "8443=http:8080; 9443=9090", annotationOutbound: "15001=http:documents.shop.svc:8443 /ns/shop/sa/documents spiffe://partner.example/documents\n15002=db.shop.svc:5432 /ns/shop/sa/db",
		annotationRequests: "cpu=20m"})
	pod.Spec.InitContainers = []corev1.Container{{Name: "migrate", Image: "example.test/migrate:1"}}
	got := patched(t, pod)
	if len(got.Spec.InitContainers) != 2 || got.Spec.InitContainers[0].Name != containerName || got.Spec.InitContainers[1].Name != "migrate" {
		t.Fatalf("init containers %+v, want the proxy before migrate", got.Spec.InitContainers)
	}
	c := got.Spec.InitContainers[0]
	if c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways || c.StartupProbe == nil {
		t.Errorf("it is no sidecar that the program waits for: %+v", c)
	}
	s := c.SecurityContext
	if !*s.RunAsNonRoot || *s.RunAsUser == 0 || !*s.ReadOnlyRootFilesystem || *s.AllowPrivilegeEscalation || *s.Privileged || len(s.Capabilities.Add) != 0 || s.Capabilities.Drop[0] != "ALL" || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("security context %+v", s)
	}
	if q := c.Resources.Requests[corev1.ResourceCPU]; q.String() != "20m" {
		t.Errorf("requests %v", c.Resources.Requests)
	}
	var conf proxyConfig
	if c.Env[0].Name != "POD_IP" || c.Env[1].Name != configVariable {
		t.Fatalf("environment %+v, want POD_IP before what refers to it", c.Env)
	}
	if err := json.Unmarshal([]byte(c.Env[1].Value), &conf); err != nil {
		t.Fatal(err)
	}
	if in := conf.Inbound; len(in) != 2 || in[0].Listen != ":8443" || in[0].Backend != "127.0.0.1:8080" || in[0].Protocol != "http" || in[1].Protocol != "tcp" || in[0].Service != "spiffe://example.org/ns/shop/sa/web" {
		t.Errorf("inbound %+v", in)
	}
	if out := conf.Outbound; len(out) != 2 || out[0].Listen != "127.0.0.1:15001" || out[0].Address != "documents.shop.svc:8443" || len(out[0].Servers) != 2 || out[1].Servers[0] != "spiffe://example.org/ns/shop/sa/db" {
		t.Errorf("outbound %+v", out)
	}
	if v := got.Spec.Volumes[len(got.Spec.Volumes)-1]; v.HostPath == nil || v.HostPath.Path != "/run/signet/agent" || !c.VolumeMounts[0].ReadOnly {
		t.Errorf("volume %+v", v)
	}
	if again := judge(t, "shop", got); !again.Allowed || again.Patch != nil {
		t.Errorf("asked again: %+v, want the pod as it is", again)
	}
	csi := patched(t, podWith(map[string]string{annotationInbound: "8443=8080", annotationSocket: "csi"}))
	if v := csi.Spec.Volumes[0]; v.CSI == nil || v.CSI.Driver != "csi.spiffe.io" {
		t.Errorf("volume %+v, want that of the CSI driver", v)
	}
}

// TestConfigurations: testdata has what the proxy is given, once the kubelet has written the pod's address in. A test of the proxy reads the same files.
func TestConfigurations(t *testing.T) {
	for name, tt := range map[string]struct {
		ip          string
		annotations map[string]string
	}{
		"in":   {"10.1.2.3", map[string]string{annotationInbound: "8443=http:8080; 9443=9090; 9444=tcp:9091; 9445=h2c:9092"}},
		"out":  {"2001:db8::2", map[string]string{annotationOutbound: "15001=http:documents.shop.svc:8443 /ns/shop/sa/documents spiffe://partner.example/documents\n15002=db.shop.svc:5432 /ns/shop/sa/db", annotationStatus: "20000"}},
		"both": {"10.1.2.3", map[string]string{annotationInbound: "8443=8080", annotationOutbound: "15001=[2001:db8::1]:8443 /documents", annotationID: "/ns/shop/sa/web", annotationService: "/web"}},
	} {
		text := strings.ReplaceAll(patched(t, podWith(tt.annotations)).Spec.InitContainers[0].Env[1].Value, "$(POD_IP)", tt.ip) + "\n"
		file := filepath.Join("testdata", "proxy-"+name+".json")
		want, err := os.ReadFile(file)
		if err != nil || text != string(want) {
			t.Errorf("%s (%v) is\n%swant\n%s", file, err, want, text)
		}
	}
}

// TestLeavesAlone: pods without the label, those of the system and of the CA's own namespace, and whatever is no pod.
func TestLeavesAlone(t *testing.T) {
	plain := podWith(map[string]string{annotationInbound: "garbage"})
	plain.Labels = nil
	for namespace, pod := range map[string]*corev1.Pod{"shop": plain, "kube-system": podWith(nil), "signet-system": podWith(nil)} {
		if r := judge(t, namespace, pod); !r.Allowed || r.Patch != nil {
			t.Errorf("a pod of %s: %+v", namespace, r)
		}
	}
	c := Config{Options: options}
	body := bytes.Replace(review(t, "shop", podWith(nil)), []byte(`"operation":"CREATE"`), []byte(`"operation":"UPDATE"`), 1)
	if out, err := c.review(body); err != nil || bytes.Contains(out, []byte("patch")) || !bytes.Contains(out, []byte(`"allowed":true`)) {
		t.Errorf("an update: %s, %v", out, err)
	}
}

// TestRefuses: nonsense keeps the pod from being made, with the annotation, the value and the fix in the message.
func TestRefuses(t *testing.T) {
	for _, tt := range []struct {
		name        string
		annotations map[string]string
		change      func(*corev1.Pod)
		says        []string
	}{
		{name: "nothing to do", says: []string{annotationInbound, annotationOutbound, "8443=http:8080"}},
		{name: "unknown annotation", annotations: map[string]string{prefix + "inbuond": "8443=8080"}, says: []string{prefix + "inbuond", "no such annotation", annotationInbound}},
		{name: "no port", annotations: map[string]string{annotationInbound: "web=8080"}, says: []string{annotationInbound, `"web"`, "8443=http:8080"}},
		{name: "port 0", annotations: map[string]string{annotationInbound: "0=8080"}, says: []string{`"0"`}},
		{name: "port too high", annotations: map[string]string{annotationInbound: "8443=65536"}, says: []string{`"65536"`}},
		{name: "unknown protocol", annotations: map[string]string{annotationInbound: "8443=ftp:21"}, says: []string{`"ftp"`, "h2c"}},
		{name: "the same port for both", annotations: map[string]string{annotationInbound: "8080=8080"}, says: []string{"cannot both listen"}},
		{name: "a port twice", annotations: map[string]string{annotationInbound: "8443=8080;8443=8081"}, says: []string{"8443 is taken"}},
		{name: "the status port", annotations: map[string]string{annotationInbound: "15090=8080"}, says: []string{"15090", annotationStatus}},
		{name: "a port of the program", annotations: map[string]string{annotationInbound: "8443=8080"}, says: []string{`"app"`, "8443", "127.0.0.1"},
			change: func(p *corev1.Pod) { p.Spec.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 8443}} }},
		{name: "no servers", annotations: map[string]string{annotationOutbound: "15001=db:5432"}, says: []string{annotationOutbound, "no SPIFFE ID"}},
		{name: "not an ID", annotations: map[string]string{annotationOutbound: "15001=db:5432 db"}, says: []string{`"db"`, "SPIFFE ID"}},
		{name: "variables of the kubelet", annotations: map[string]string{annotationOutbound: "15001=$(SECRET):5432 /db"}, says: []string{"HOST:PORT"}},
		{name: "no such socket", annotations: map[string]string{annotationInbound: "8443=8080", annotationSocket: "nfs"}, says: []string{annotationSocket, `"nfs"`, "csi"}},
		{name: "resources", annotations: map[string]string{annotationInbound: "8443=8080", annotationLimits: "memory=much"}, says: []string{annotationLimits, `"much"`, "32Mi"}},
		{name: "more than the limit", annotations: map[string]string{annotationInbound: "8443=8080", annotationRequests: "memory=1Gi"}, says: []string{annotationRequests, "128Mi"}},
		{name: "another's container", annotations: map[string]string{annotationInbound: "8443=8080"}, says: []string{"signet-proxy", "another name"},
			change: func(p *corev1.Pod) { p.Spec.Containers[0].Name = containerName }},
		{name: "a label that is neither", says: []string{Label, `"yes"`}, change: func(p *corev1.Pod) { p.Labels[Label] = "yes" }},
		{name: "an endless value", annotations: map[string]string{annotationInbound: strings.Repeat("8443=8080;", 1000)}, says: []string{"bytes"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pod := podWith(tt.annotations)
			if tt.change != nil {
				tt.change(pod)
			}
			r := judge(t, "shop", pod)
			if r.Allowed || r.Patch != nil {
				t.Fatalf("answer %+v, want a refusal", r)
			}
			for _, s := range tt.says {
				if !strings.Contains(r.Result.Message, s) {
					t.Errorf("message %q has no %q", r.Result.Message, s)
				}
			}
		})
	}
}

// TestServes: over TLS that is verified as API servers do it; what is no review is refused, with bounds.
func TestServes(t *testing.T) {
	w := start(t)
	eventually(t, "caBundle", func() bool { return len(w.caBundle()) > 0 })
	good := review(t, "shop", podWith(map[string]string{annotationInbound: "8443=8080"}))
	var status int
	var answer []byte
	eventually(t, "answer", func() bool {
		var err error
		status, answer, err = w.post(w.caBundle(), good, "application/json")
		return err == nil
	})
	if status != http.StatusOK || !bytes.Contains(answer, []byte(`"patchType":"JSONPatch"`)) {
		t.Errorf("status %d, answer %s", status, answer)
	}
	for _, tt := range []struct {
		name, contentType string
		body              []byte
		status            int
	}{
		{"no JSON", "application/json", []byte("}{"), http.StatusBadRequest},
		{"another object", "application/json", []byte(`{"kind":"Pod","apiVersion":"v1"}`), http.StatusBadRequest},
		{"no request", "application/json", []byte(`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}`), http.StatusBadRequest},
		{"another version", "application/json", bytes.Replace(good, []byte("admission.k8s.io/v1"), []byte("admission.k8s.io/v1beta1"), 1), http.StatusBadRequest},
		{"a form", "application/x-www-form-urlencoded", good, http.StatusUnsupportedMediaType},
		{"too large", "application/json", append(bytes.Repeat([]byte(" "), maxReviewBytes), good...), http.StatusRequestEntityTooLarge},
	} {
		if status, _, err := w.post(w.caBundle(), tt.body, tt.contentType); err != nil || status != tt.status {
			t.Errorf("%s: status %d, %v; want %d", tt.name, status, err, tt.status)
		}
	}
}

// TestRotation: authorities are prepared, activated and revoked while admissions go on, and none fails. An API server's idea
// of the caBundle is a second old.
func TestRotation(t *testing.T) {
	w := start(t)
	body := review(t, "shop", podWith(map[string]string{annotationInbound: "8443=8080"}))
	eventually(t, "first answer", func() bool {
		status, _, err := w.post(w.caBundle(), body, "application/json")
		return err == nil && status == http.StatusOK
	})
	ctx, stop := context.WithCancel(t.Context())
	var asked, failed atomic.Int64
	var asking sync.WaitGroup
	asking.Go(func() {
		for ctx.Err() == nil {
			bundle := w.caBundle()
			// What is read now is used for a while, as an API server does until its watch tells it more.
			for until := time.Now().Add(time.Second); time.Now().Before(until) && ctx.Err() == nil; {
				asked.Add(1)
				if status, _, err := w.post(bundle, body, "application/json"); err != nil || status != http.StatusOK {
					failed.Add(1)
					t.Errorf("admission %d: status %d, %v", asked.Load(), status, err)
				}
			}
		}
	})
	step := func(s authority.Step, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s.Authority.ID
	}
	first := w.set.Bundle().X509[0].ID
	for range 2 {
		fresh := step(w.set.Prepare(t.Context(), authority.KindX509))
		step(w.set.Activate(t.Context(), authority.KindX509, fresh))
		shows := func(id string) bool {
			c, err := w.server.held.get()
			return err == nil && fmt.Sprintf("%x", c.Leaf.AuthorityKeyId) == id
		}
		eventually(t, "certificate by the new authority", func() bool { return shows(fresh) })
		step(w.set.Taint(t.Context(), authority.KindX509, first))
		step(w.set.Revoke(t.Context(), authority.KindX509, first))
		eventually(t, "caBundle without the revoked authority", func() bool {
			certs := parse(w.caBundle())
			return len(certs) == 1 && fmt.Sprintf("%x", certs[0].SubjectKeyId) == fresh
		})
		first = fresh
	}
	stop()
	asking.Wait()
	if asked.Load() < 10 || failed.Load() != 0 {
		t.Errorf("%d of %d admissions failed", failed.Load(), asked.Load())
	}
	t.Logf("%d admissions, %d certificates", asked.Load(), w.signed.Load())
}

// FuzzReview: whatever comes, the answer is a refusal to read it, or a review that is allowed or says why not; and a patch
// never does more than add.
func FuzzReview(f *testing.F) {
	f.Add(review(f, "shop", podWith(map[string]string{annotationInbound: "8443=http:8080", annotationOutbound: "15001=a:1 /b"})))
	f.Add([]byte(`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"x","operation":"CREATE","resource":{"version":"v1","resource":"pods"},"object":{"metadata":{"labels":{"signet-id.github.io/inject":"true"}}}}}`))
	c := Config{Options: options, Namespace: "signet-system"}
	f.Fuzz(func(t *testing.T, body []byte) {
		out, err := c.review(body)
		if err != nil {
			return
		}
		var r admissionv1.AdmissionReview
		if err := json.Unmarshal(out, &r); err != nil || r.Response == nil {
			t.Fatalf("answer %s: %v", out, err)
		}
		if !r.Response.Allowed && (r.Response.Patch != nil || r.Response.Result == nil || r.Response.Result.Message == "") {
			t.Errorf("a refusal without a reason, or with a patch: %s", out)
		}
		if r.Response.Patch == nil {
			return
		}
		var ops []operation
		if err := json.Unmarshal(r.Response.Patch, &ops); err != nil {
			t.Fatal(err)
		}
		for _, o := range ops {
			if o.Op != "add" {
				t.Errorf("operation %q", o.Op)
			}
		}
	})
}

// A webhook whose listener fails says so at once: nobody is to go on beside one that answers nobody.
func TestListenerFails(t *testing.T) {
	s, err := New(Config{Options: options, Cluster: "prod", Configurations: fake.NewClientset().AdmissionregistrationV1().MutatingWebhookConfigurations(), Namespace: "signet-system",
		Webhook: "signet-inject", Listen: "127.0.0.1:0", Sign: func(context.Context, crypto.PublicKey) (*authority.X509SVID, error) { return nil, errors.New("no key") },
		Active: func() string { return "" }, Roots: func() []*x509.Certificate { return nil }, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), "the admission webhook: ") {
		t.Errorf("Run = %v, want the listener's error before its context ends", err)
	}
}
