package podcert

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	certificatesclient "k8s.io/client-go/kubernetes/typed/certificates/v1beta1"
	clienttesting "k8s.io/client-go/testing"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/keys"
	"github.com/signet-id/signet/ca/kube/follow/followtest"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/store/bolt"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.org")

// A world is a cluster as the CA sees it, with everything else real: the authorities, the registry and the audit log.
type world struct {
	t      testing.TB
	client *fake.Clientset
	set    *authority.Set
	reg    *registry.Registry
	audit  *auditlog.Log
	signer *Signer
	ahead  atomic.Int64 // of the clock, in nanoseconds

	mu       sync.Mutex // guards what follows
	pods     map[string]*pods.Pod
	entries  map[string][]*registry.Entry
	synced   bool
	canaries []string
	counts   map[string]int
	fails    func(*certificatesv1beta1.PodCertificateRequest) error
}

// answering has answers fail as the test says.
func (w *world) answering(fails func(*certificatesv1beta1.PodCertificateRequest) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fails = fails
}

func (w *world) Pod(_, uid string) *pods.Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pods[uid]
}

func (w *world) Entries(_, uid string) []*registry.Entry {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.entries[uid])
}

func (w *world) IsSynced(string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.synced
}

func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.ahead.Load())) }

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, client: fake.NewClientset(), pods: map[string]*pods.Pod{}, entries: map[string][]*registry.Entry{}, synced: true, counts: map[string]int{}}
	w.client.PrependReactor("update", "podcertificaterequests", func(a clienttesting.Action) (bool, runtime.Object, error) {
		w.mu.Lock()
		fails := w.fails
		w.mu.Unlock()
		if fails == nil {
			return false, nil, nil
		}
		err := fails(a.(clienttesting.UpdateAction).GetObject().(*certificatesv1beta1.PodCertificateRequest))
		return err != nil, nil, err
	})
	log := slog.New(slog.DiscardHandler)
	store, err := bolt.Open(bolt.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	seal, err := keys.CreateSealKey(filepath.Join(t.TempDir(), "seal.key"))
	if err != nil {
		t.Fatal(err)
	}
	if w.set, err = authority.Open(t.Context(), authority.Config{TrustDomain: td, Store: store, Seal: seal, Now: w.now, Log: log}); err != nil {
		t.Fatal(err)
	}
	if w.reg, err = registry.Open(t.Context(), registry.Config{TrustDomain: td, Store: store, Now: w.now}); err != nil {
		t.Fatal(err)
	}
	if w.audit, err = auditlog.Open(auditlog.Config{Dir: t.TempDir(), Log: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.audit.Close() })
	place := new(followtest.Place)
	w.signer = New(Config{Cluster: "prod", Requests: func(ns string) Requests {
		return requests{w.client.CertificatesV1beta1().PodCertificateRequests(ns), place}
	}, Pods: w, TrustDomain: td, Authority: w.set, Registry: w.reg, Audit: w.audit, TTL: time.Hour,
		Agents: func(uid string) []*registry.Node {
			n, err := w.reg.Node(agentOf(uid))
			if err != nil {
				return nil
			}
			return []*registry.Node{n}
		},
		Canary: func(_ context.Context, id spiffeid.ID, kind, who, address string) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.canaries = append(w.canaries, fmt.Sprint(id, kind, who, address))
		},
		Issued: func(kind, outcome string, n int) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.counts[kind+"/"+outcome] += n
		}, Now: w.now, Log: log})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := w.reg.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	running.Go(func() {
		if err := w.signer.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return w
}

// requests are those of a fake clientset, which can be followed.
type requests struct {
	certificatesclient.PodCertificateRequestInterface
	place *followtest.Place
}

func (r requests) List(ctx context.Context, o metav1.ListOptions) (*certificatesv1beta1.PodCertificateRequestList, error) {
	return followtest.List(ctx, r.place, r.PodCertificateRequestInterface, o)
}

func (r requests) Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	return followtest.Watch(ctx, r.place, r.PodCertificateRequestInterface, o)
}

func agentOf(nodeUID string) spiffeid.ID {
	return spiffeid.RequireFromPath(td, "/spire/agent/k8s_psat/prod/"+nodeUID)
}

// pod adds the pod web of namespace shop on node one, changed as the test likes, with an entry for each SPIFFE ID path.
func (w *world) pod(uid string, change func(*pods.Pod), paths ...string) *pods.Pod {
	p := &pods.Pod{Cluster: "prod", UID: uid, NodeName: "one", NodeUID: "node-1", Namespace: "shop", Name: "web-" + uid, ServiceAccount: "web", Created: w.now()}
	if change != nil {
		change(p)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pods[uid] = p
	for i, path := range paths {
		w.entries[uid] = append(w.entries[uid], &registry.Entry{ID: registry.EntryID(fmt.Sprintf("pod.%s.%d", uid, i)), SPIFFEID: spiffeid.RequireFromPath(td, path),
			Selectors: []spiffe.Selector{{Type: "k8s", Value: "pod-uid:" + uid}}, On: []spiffe.Selector{{Type: "k8s_psat", Value: "cluster:prod"}}})
	}
	return p
}

// change replaces the first entry of a pod by a changed one.
func (w *world) change(uid string, change func(*registry.Entry)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := *w.entries[uid][0]
	change(&e)
	w.entries[uid] = append([]*registry.Entry{&e}, w.entries[uid][1:]...)
}

// prove signs a pod's UID as kubelets do.
func prove(t testing.TB, key crypto.Signer, uid string) (pkix, proof []byte) {
	t.Helper()
	pkix, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte(uid))
	switch key := key.(type) {
	case *rsa.PrivateKey:
		proof, err = rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], nil)
	case *ecdsa.PrivateKey:
		proof, err = ecdsa.SignASN1(rand.Reader, key, digest[:])
	case ed25519.PrivateKey:
		proof = ed25519.Sign(key, []byte(uid))
	}
	if err != nil {
		t.Fatal(err)
	}
	return pkix, proof
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// request makes a request as the kubelet of the pod's node would.
func (w *world) request(p *pods.Pod, key crypto.Signer, change func(*certificatesv1beta1.PodCertificateRequest)) *certificatesv1beta1.PodCertificateRequest {
	w.t.Helper()
	pkix, proof := prove(w.t, key, p.UID)
	day := int32(86400)
	r := &certificatesv1beta1.PodCertificateRequest{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: "req-" + p.UID + "-" + rand.Text(), CreationTimestamp: metav1.NewTime(w.now())},
		Spec: certificatesv1beta1.PodCertificateRequestSpec{SignerName: SignerName, PodName: p.Name, PodUID: types.UID(p.UID), ServiceAccountName: p.ServiceAccount, ServiceAccountUID: "sa-1",
			NodeName: types.NodeName(p.NodeName), NodeUID: types.UID(p.NodeUID), MaxExpirationSeconds: &day, PKIXPublicKey: pkix, ProofOfPossession: proof}}
	if change != nil {
		change(r)
	}
	made, err := w.client.CertificatesV1beta1().PodCertificateRequests(r.Namespace).Create(w.t.Context(), r, metav1.CreateOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return made
}

// get returns a request as it is now.
func (w *world) get(r *certificatesv1beta1.PodCertificateRequest) *certificatesv1beta1.PodCertificateRequest {
	w.t.Helper()
	got, err := w.client.CertificatesV1beta1().PodCertificateRequests(r.Namespace).Get(w.t.Context(), r.Name, metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return got
}

// tries is how often the signer put a request off.
func (w *world) tries(r *certificatesv1beta1.PodCertificateRequest) int {
	tries := w.signer.tries.Load()
	if tries == nil {
		return 0
	}
	return tries.NumRequeues(types.NamespacedName{Namespace: r.Namespace, Name: r.Name})
}

// answered waits for the answer to a request.
func (w *world) answered(r *certificatesv1beta1.PodCertificateRequest) *certificatesv1beta1.PodCertificateRequest {
	w.t.Helper()
	var got *certificatesv1beta1.PodCertificateRequest
	eventually(w.t, "an answer to "+r.Name, func() bool {
		got = w.get(r)
		return answered(got)
	})
	return got
}

// eventually waits until is holds, and fails the test after a minute.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
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

// leafOf reads the chain of an answer.
func leafOf(t testing.TB, r *certificatesv1beta1.PodCertificateRequest) (leaf *x509.Certificate, intermediates []*x509.Certificate) {
	t.Helper()
	for rest := []byte(r.Status.CertificateChain); len(rest) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		if leaf == nil {
			leaf = c
		} else {
			intermediates = append(intermediates, c)
		}
	}
	if leaf == nil {
		t.Fatalf("no chain in the answer: %+v", r.Status)
	}
	return leaf, intermediates
}

// records returns what the audit log has of an event.
func (w *world) records(event string) []auditlog.Record {
	w.t.Helper()
	var out []auditlog.Record
	if err := w.audit.Search(w.t.Context(), auditlog.Filter{}, func(r auditlog.Record) error {
		if r.Event == event {
			out = append(out, r)
		}
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
	return out
}

// apply applies documents.
func (w *world) apply(text string) {
	w.t.Helper()
	docs, err := strictyaml.Split([]byte(text), "test.yaml", 1)
	if err != nil {
		w.t.Fatal(err)
	}
	p, err := w.reg.Plan(docs, registry.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	rev, err := w.reg.Apply(w.t.Context(), p)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.reg.WaitFor(w.t.Context(), rev); err != nil {
		w.t.Fatal(err)
	}
}

// volume is a pod as the API server has it, with a volume of a signer.
func volume(signer string, annotations map[string]string) *corev1.Pod {
	return &corev1.Pod{Spec: corev1.PodSpec{Volumes: []corev1.Volume{{Name: "other"}, {Name: "svid", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{{}, {PodCertificate: &corev1.PodCertificateProjection{SignerName: signer, KeyType: "ECDSAP256", UserAnnotations: annotations}}}}}}}}}
}
