package podcert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"

	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// TestSigns: a pod gets its X509-SVID for every kind of key that a kubelet makes, with the times that the API demands, and
// the audit log has it.
func TestSigns(t *testing.T) {
	w := newWorld(t)
	p := w.pod("1", nil, "/ns/shop/sa/web")
	w.change("1", func(e *registry.Entry) { e.DNSNames = []string{"web.shop.svc"} })
	rsaKey, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	for _, a := range w.set.Bundle().X509 {
		roots.AddCert(a.Certificate)
	}
	keys := map[string]crypto.Signer{"ECDSAP256": newKey(t), "ECDSAP384": p384, "ECDSAP521": p521, "RSA3072": rsaKey, "ED25519": edKey}
	for name, key := range keys {
		t.Run(name, func(t *testing.T) {
			got := w.answered(w.request(p, key, nil))
			if c := got.Status.Conditions[0]; c.Type != "Issued" || c.Status != metav1.ConditionTrue || c.LastTransitionTime.IsZero() {
				t.Fatalf("condition %+v, want Issued", c)
			}
			leaf, between := leafOf(t, got)
			pool := x509.NewCertPool()
			for _, c := range between {
				pool.AddCert(c)
			}
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: pool, DNSName: "web.shop.svc"}); err != nil {
				t.Errorf("the chain does not lead to the bundle: %v", err)
			}
			if id, err := spiffe.CheckX509SVIDLeaf(leaf); err != nil || id.String() != "spiffe://example.org/ns/shop/sa/web" {
				t.Errorf("SPIFFE ID %v, %v", id, err)
			}
			if !leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(key.Public()) {
				t.Error("it is for another key")
			}
			st := got.Status
			if !st.NotBefore.Time.Equal(leaf.NotBefore) || !st.NotAfter.Time.Equal(leaf.NotAfter) {
				t.Errorf("status says %v to %v, the leaf %v to %v", st.NotBefore, st.NotAfter, leaf.NotBefore, leaf.NotAfter)
			}
			if lasts := leaf.NotAfter.Sub(leaf.NotBefore); lasts < time.Hour || lasts > 24*time.Hour {
				t.Errorf("it lasts %v", lasts)
			}
			if st.BeginRefreshAt.Before(&metav1.Time{Time: leaf.NotBefore.Add(10 * time.Minute)}) || st.BeginRefreshAt.After(leaf.NotAfter.Add(-10*time.Minute)) {
				t.Errorf("begins to refresh at %v, valid %v to %v", st.BeginRefreshAt, leaf.NotBefore, leaf.NotAfter)
			}
			found := false
			for _, r := range w.records("x509svid.issued") {
				found = found || r.Details["serial"] == leaf.SerialNumber.String() && r.Details["pod_uid"] == "1" && r.Subject == "spiffe://example.org/ns/shop/sa/web"
			}
			if !found {
				t.Error("the audit log does not have its serial number")
			}
		})
	}
}

// TestLifetime: the Identity's TTL holds, cut by what the request allows, and never below the API's hour.
func TestLifetime(t *testing.T) {
	w := newWorld(t)
	for i, tt := range []struct {
		name  string
		ttl   time.Duration
		most  int32
		lasts time.Duration // 0: denied
	}{
		{name: "default", most: 86400, lasts: time.Hour + 30*time.Second},
		{name: "the Identity's", ttl: 3 * time.Hour, most: 86400, lasts: 3*time.Hour + 30*time.Second},
		{name: "the request's", ttl: 3 * time.Hour, most: 7200, lasts: 2 * time.Hour},
		{name: "the shortest that can be asked for", most: 3600, lasts: time.Hour},
		{name: "exactly an hour", ttl: time.Hour - 30*time.Second, most: 86400, lasts: time.Hour},
		{name: "an Identity of five minutes", ttl: 5 * time.Minute, most: 86400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			uid := fmt.Sprint(i)
			p := w.pod(uid, nil, "/web")
			w.change(uid, func(e *registry.Entry) { e.X509TTL = tt.ttl })
			got := w.answered(w.request(p, newKey(t), func(r *certificatesv1beta1.PodCertificateRequest) { r.Spec.MaxExpirationSeconds = &tt.most }))
			if tt.lasts == 0 {
				if c := got.Status.Conditions[0]; c.Type != "Denied" || c.Reason != "TTLTooShort" || !strings.Contains(c.Message, "raise x509TTL") {
					t.Errorf("condition %+v, want Denied with the fix", c)
				}
				return
			}
			if leaf, _ := leafOf(t, got); leaf.NotAfter.Sub(leaf.NotBefore) != tt.lasts {
				t.Errorf("it lasts %v, want %v", leaf.NotAfter.Sub(leaf.NotBefore), tt.lasts)
			}
		})
	}
}

// TestDenied: a request that lies, or for which there is no one answer, gets nothing but a reason. What may still change is
// denied only after a while.
func TestDenied(t *testing.T) {
	for _, tt := range []struct {
		name   string
		paths  []string
		pod    func(*pods.Pod)
		entry  func(*registry.Entry)
		change func(*testing.T, *certificatesv1beta1.PodCertificateRequest)
		later  bool // only after patience
		reason string
		says   string
	}{
		{name: "garbage for a key", paths: []string{"/web"}, reason: "UnsupportedKeyType", says: "keyType: ECDSAP256",
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) {
				r.Spec.PKIXPublicKey = []byte("garbage")
			}},
		{name: "a weak key", paths: []string{"/web"}, reason: "UnsupportedKeyType", says: "P-256",
			change: func(t *testing.T, r *certificatesv1beta1.PodCertificateRequest) {
				key, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
				if err != nil {
					t.Fatal(err)
				}
				r.Spec.PKIXPublicKey, r.Spec.ProofOfPossession = prove(t, key, string(r.Spec.PodUID))
			}},
		{name: "a proof of another pod", paths: []string{"/web"}, reason: "InvalidProofOfPossession", says: "the pod's UID",
			change: func(t *testing.T, r *certificatesv1beta1.PodCertificateRequest) {
				r.Spec.PKIXPublicKey, r.Spec.ProofOfPossession = prove(t, newKey(t), "2")
			}},
		{name: "no proof", paths: []string{"/web"}, reason: "InvalidProofOfPossession",
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) { r.Spec.ProofOfPossession = nil }},
		{name: "an unknown annotation", paths: []string{"/web"}, reason: "InvalidUnverifiedUserAnnotations", says: `"example.com/x"`,
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) {
				r.Spec.UnverifiedUserAnnotations = map[string]string{"example.com/x": "y"}
			}},
		{name: "an ID of another trust domain", paths: []string{"/web"}, reason: "InvalidUnverifiedUserAnnotations", says: "example.org",
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) {
				r.Spec.UnverifiedUserAnnotations = map[string]string{AnnotationID: "spiffe://evil.test/web"}
			}},
		{name: "an ID that the pod does not have", paths: []string{"/web"}, later: true, reason: "NoIdentity", says: "spiffe://example.org/admin",
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) {
				r.Spec.UnverifiedUserAnnotations = map[string]string{AnnotationID: "/admin"}
			}},
		{name: "several IDs", paths: []string{"/a", "/b"}, later: true, reason: "SeveralIdentities", says: AnnotationID},
		{name: "no ID", later: true, reason: "NoIdentity", says: "apply one"},
		{name: "an unknown pod", paths: []string{"/web"}, later: true, reason: "PodUnknown", says: `"99"`,
			change: func(t *testing.T, r *certificatesv1beta1.PodCertificateRequest) {
				r.Spec.PodUID = "99"
				r.Spec.PKIXPublicKey, r.Spec.ProofOfPossession = prove(t, newKey(t), "99")
			}},
		{name: "another namespace", paths: []string{"/web"}, reason: "PodDiffers", says: "namespace",
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) { r.Namespace = "evil" }},
		{name: "another pod's name", paths: []string{"/web"}, reason: "PodDiffers", says: "podName",
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) { r.Spec.PodName = "other" }},
		{name: "another service account", paths: []string{"/web"}, reason: "PodDiffers", says: "serviceAccountName",
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) { r.Spec.ServiceAccountName = "admin" }},
		{name: "another node", paths: []string{"/web"}, reason: "PodDiffers", says: "nodeName",
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) { r.Spec.NodeName = "two" }},
		{name: "a former node of that name", paths: []string{"/web"}, later: true, reason: "PodDiffers", says: "nodeUID",
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) { r.Spec.NodeUID = "node-0" }},
		{name: "a pod on no node", paths: []string{"/web"}, pod: func(p *pods.Pod) { p.NodeUID = "" }, later: true, reason: "PodUnknown", says: "which node"},
		{name: "a mirror pod", paths: []string{"/web"}, pod: func(p *pods.Pod) { p.Mirror = true }, reason: "PodDiffers", says: "static"},
		{name: "a pod that has ended", paths: []string{"/web"}, pod: func(p *pods.Pod) { p.Ended = true }, reason: "PodDiffers", says: "ended"},
		{name: "a pod without the volume", paths: []string{"/web"}, pod: func(p *pods.Pod) { p.Object = volume("example.com/other", nil) }, reason: "NoSuchVolume", says: SignerName},
		{name: "a pod whose volume says otherwise", paths: []string{"/a", "/b"}, reason: "NoSuchVolume",
			pod: func(p *pods.Pod) { p.Object = volume(SignerName, map[string]string{AnnotationID: "/b"}) },
			change: func(_ *testing.T, r *certificatesv1beta1.PodCertificateRequest) {
				r.Spec.UnverifiedUserAnnotations = map[string]string{AnnotationID: "/a"}
			}},
		{name: "an Identity of one container", paths: []string{"/web"}, later: true, reason: "NoIdentity", says: "some of its containers",
			entry: func(e *registry.Entry) {
				e.Selectors = append(e.Selectors, spiffe.Selector{Type: "k8s", Value: "container-name:app"})
			}},
		{name: "an Identity for another node", paths: []string{"/web"}, later: true, reason: "IdentityNotForNode", says: "`on`",
			entry: func(e *registry.Entry) {
				e.On = append(e.On, spiffe.Selector{Type: "node", Value: "group:backend"})
			}},
		{name: "an Identity that has ended", paths: []string{"/web"}, later: true, reason: "NoIdentity",
			entry: func(e *registry.Entry) { e.ExpiresAt = time.Now().Add(-time.Minute) }},
		{name: "an Identity of an admin", paths: []string{"/web"}, later: true, reason: "NoIdentity", entry: func(e *registry.Entry) { e.Admin = true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // they wait
			w := newWorld(t)
			p := w.pod("1", tt.pod, tt.paths...)
			if tt.entry != nil {
				w.change("1", tt.entry)
			}
			r := w.request(p, newKey(t), func(r *certificatesv1beta1.PodCertificateRequest) {
				if tt.change != nil {
					tt.change(t, r)
				}
			})
			if tt.later {
				eventually(t, "tries", func() bool {
					return w.tries(r) >= 2
				})
				if got := w.get(r); answered(got) {
					t.Fatalf("answered too early: %+v", got.Status.Conditions)
				}
				w.ahead.Store(int64(2 * patience))
			}
			got := w.answered(r)
			c := got.Status.Conditions[0]
			if c.Type != "Denied" || c.Reason != tt.reason || !strings.Contains(c.Message, tt.says) {
				t.Errorf("condition %+v, want Denied, %s, with %q", c, tt.reason, tt.says)
			}
			if got.Status.CertificateChain != "" || got.Status.NotAfter != nil {
				t.Errorf("there is a certificate: %+v", got.Status)
			}
			if len(w.records("x509svid.issued")) != 0 {
				t.Error("something was issued")
			}
			eventually(t, "record of the refusal", func() bool { return len(w.records("x509svid.refused")) == 1 })
		})
	}
}

// TestChooses: of several IDs the one that the volume names, absolute or relative.
func TestChooses(t *testing.T) {
	w := newWorld(t)
	for i, want := range []string{"/b", "spiffe://example.org/a"} {
		uid := fmt.Sprint(i)
		p := w.pod(uid, func(p *pods.Pod) { p.Object = volume(SignerName, map[string]string{AnnotationID: want}) }, "/a", "/b")
		got := w.answered(w.request(p, newKey(t), func(r *certificatesv1beta1.PodCertificateRequest) {
			r.Spec.UnverifiedUserAnnotations = map[string]string{AnnotationID: want}
		}))
		if leaf, _ := leafOf(t, got); !strings.HasSuffix(leaf.URIs[0].String(), strings.TrimPrefix(want, td.IDString())) {
			t.Errorf("asked for %s, got %s", want, leaf.URIs[0])
		}
	}
}

// TestRegisteredFirst: a pod that has a registered ID by a template, such as by its labels, gets no certificate for it, also
// when it was registered while the pod had one; the pod's other IDs are not touched by it.
func TestRegisteredFirst(t *testing.T) {
	w := newWorld(t)
	w.apply("kind: Identity\nname: payments\nspiffeID: /app/payments\nmatch: [unix:user:payments]\n")
	r := w.request(w.pod("1", nil, "/app/payments"), newKey(t), nil)
	eventually(t, "tries", func() bool { return answered(w.get(r)) || w.tries(r) > patientTries })
	w.ahead.Store(int64(2 * patience))
	got := w.answered(r)
	if c := got.Status.Conditions[0]; c.Type != "Denied" || c.Reason != "NoIdentity" || !strings.Contains(c.Message, "is the SPIFFE ID of Identity payments") {
		t.Errorf("condition %+v, want Denied, since the ID is Identity payments'", c)
	}
	if got.Status.CertificateChain != "" || len(w.records("x509svid.issued")) != 0 {
		t.Error("a certificate was issued")
	}
	leafOf(t, w.answered(w.request(w.pod("2", nil, "/app/web"), newKey(t), nil)))
	if leaf, _ := leafOf(t, w.answered(w.request(w.pod("3", nil, "/app/payments", "/app/other"), newKey(t), nil))); leaf.URIs[0].Path != "/app/other" {
		t.Errorf("the certificate is for %s", leaf.URIs[0])
	}
	w.apply("kind: Identity\nname: web\nspiffeID: /app/web\nmatch: [unix:user:web]\n")
	r = w.request(w.pod("4", nil, "/app/web"), newKey(t), nil)
	eventually(t, "tries", func() bool { return w.tries(r) > 0 })
	if answered(w.get(r)) {
		t.Errorf("the certificate for an ID that is another one's by now was answered: %+v", w.get(r).Status)
	}
}

// TestWaitsForWhatComes: a request that is faster than the CA's own sight of the pod, and of the rules, is answered when
// these come; while the pods are not known, nothing is denied at all.
func TestWaitsForWhatComes(t *testing.T) {
	w := newWorld(t)
	w.mu.Lock()
	w.synced = false
	w.mu.Unlock()
	p := &pods.Pod{Cluster: "prod", UID: "1", NodeName: "one", NodeUID: "node-1", Namespace: "shop", Name: "web-1", ServiceAccount: "web"}
	r := w.request(p, newKey(t), nil)
	w.ahead.Store(int64(2 * patience))
	eventually(t, "tries", func() bool {
		return w.tries(r) > patientTries
	})
	if got := w.get(r); answered(got) {
		t.Fatalf("answered while the pods are not known: %+v", got.Status.Conditions)
	}
	w.ahead.Store(0)
	w.pod("1", nil, "/web")
	leafOf(t, w.answered(r))
}

// TestRevoked: nothing is issued for a revoked ID or to a banned node, and what a node got is revoked with it.
func TestRevoked(t *testing.T) {
	w := newWorld(t)
	p := w.pod("1", nil, "/web")
	before, _ := leafOf(t, w.answered(w.request(p, newKey(t), nil)))
	id := spiffe.Selector{Type: "k8s_psat", Value: "cluster:prod"}
	node := &registry.Node{ID: agentOf("node-1"), Attestation: "k8s_psat", Selectors: []spiffe.Selector{id}, Serial: "1", ExpiresAt: time.Now().Add(time.Hour), CreatedAt: time.Now()}
	if err := w.reg.PutNode(t.Context(), node, nil); err != nil {
		t.Fatal(err)
	}
	if err := w.reg.WaitFor(t.Context(), node.Revision); err != nil {
		t.Fatal(err)
	}
	// The second in which the revocation is made is over, so that what is issued now may be good.
	w.ahead.Store(int64(2 * time.Second))
	w.apply("kind: Revocation\nname: stolen\nagent: " + agentOf("node-1").String() + "\n")
	if name, revoked := w.reg.RevokedX509(before, p2id(t, "/web")); !revoked || !strings.HasPrefix(name, "stolen") {
		t.Errorf("what the node's kubelet got is revoked by %q, %t; want stolen", name, revoked)
	}
	w.ahead.Store(int64(2 * time.Minute))
	after, _ := leafOf(t, w.answered(w.request(p, newKey(t), nil)))
	if name, revoked := w.reg.RevokedX509(after, p2id(t, "/web")); revoked {
		t.Errorf("what it got after it was let in again is revoked by %q", name)
	}

	w.apply("kind: Revocation\nname: leak\nid: /web\n")
	if c := w.answered(w.request(p, newKey(t), nil)).Status.Conditions[0]; c.Type != "Denied" || c.Reason != "Revoked" || !strings.Contains(c.Message, "leak") {
		t.Errorf("of a revoked ID: %+v", c)
	}

	other := w.pod("2", nil, "/other")
	banned, err := w.reg.NodeNow(t.Context(), node.ID)
	if err != nil {
		t.Fatal(err)
	}
	b := *banned
	b.Banned, b.Serial = true, ""
	if err := w.reg.PutNode(t.Context(), &b, nil); err != nil {
		t.Fatal(err)
	}
	if err := w.reg.WaitFor(t.Context(), b.Revision); err != nil {
		t.Fatal(err)
	}
	if c := w.answered(w.request(other, newKey(t), nil)).Status.Conditions[0]; c.Type != "Denied" || c.Reason != "NodeBanned" {
		t.Errorf("on a banned node: %+v", c)
	}
}

// TestNodeGroup: an Identity for a group of nodes holds once the node's agent has proven that it is one.
func TestNodeGroup(t *testing.T) {
	w := newWorld(t)
	group := spiffe.Selector{Type: "node", Value: "group:backend"}
	p := w.pod("1", nil, "/web")
	w.change("1", func(e *registry.Entry) { e.On = append(e.On, group) })
	r := w.request(p, newKey(t), nil)
	eventually(t, "try", func() bool {
		return w.tries(r) >= 1
	})
	node := &registry.Node{ID: agentOf("node-1"), Attestation: "k8s_psat", Selectors: []spiffe.Selector{group}, Serial: "1", ExpiresAt: time.Now().Add(time.Hour), CreatedAt: time.Now()}
	if err := w.reg.PutNode(t.Context(), node, nil); err != nil {
		t.Fatal(err)
	}
	leafOf(t, w.answered(r))
}

// TestCanary: an ID that nobody should hold is issued, and somebody is told.
func TestCanary(t *testing.T) {
	w := newWorld(t)
	p := w.pod("1", nil, "/honeypot")
	w.change("1", func(e *registry.Entry) { e.Canary = true })
	leafOf(t, w.answered(w.request(p, newKey(t), nil)))
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.canaries) != 1 || !strings.Contains(w.canaries[0], "/honeypot") || !strings.Contains(w.canaries[0], "shop/web-1") {
		t.Errorf("told %q, want the ID and the pod once", w.canaries)
	}
}

// TestNothingLeavesUnlogged: with the audit log gone, the request stays open.
func TestNothingLeavesUnlogged(t *testing.T) {
	w := newWorld(t)
	p := w.pod("1", nil, "/web")
	if err := w.audit.Close(); err != nil {
		t.Fatal(err)
	}
	r := w.request(p, newKey(t), nil)
	eventually(t, "tries", func() bool {
		return w.tries(r) >= 3
	})
	if got := w.get(r); answered(got) || got.Status.CertificateChain != "" {
		t.Errorf("answered without an audit log: %+v", got.Status)
	}
}

// TestOthersRequests: requests for other signers are not touched, and what another replica answered stays.
func TestOthersRequests(t *testing.T) {
	w := newWorld(t)
	p := w.pod("1", nil, "/web")
	foreign := w.request(p, newKey(t), func(r *certificatesv1beta1.PodCertificateRequest) { r.Spec.SignerName = "example.com/other" })
	raced := make(chan struct{})
	var once sync.Once
	var theirs atomic.Bool // the other replica has written its answer
	w.answering(func(answer *certificatesv1beta1.PodCertificateRequest) error {
		if theirs.Load() || answer.Status.CertificateChain == "theirs" {
			return nil
		}
		once.Do(func() { close(raced) })
		return apierrors.NewConflict(schema.GroupResource{Resource: "podcertificaterequests"}, answer.Name, nil)
	})
	r := w.request(p, newKey(t), nil)
	<-raced
	faster := r.DeepCopy()
	faster.Status = certificatesv1beta1.PodCertificateRequestStatus{CertificateChain: "theirs", Conditions: []metav1.Condition{{Type: "Issued", Status: metav1.ConditionTrue}}}
	if _, err := w.client.CertificatesV1beta1().PodCertificateRequests(r.Namespace).UpdateStatus(t.Context(), faster, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	theirs.Store(true)
	if got := w.answered(r); got.Status.CertificateChain != "theirs" {
		t.Errorf("the other replica's answer became %+v", got.Status)
	}
	leafOf(t, w.answered(w.request(p, newKey(t), nil))) // what came first was looked at by now
	if got := w.get(foreign); len(got.Status.Conditions) != 0 {
		t.Errorf("a request for another signer was answered: %+v", got.Status)
	}
}

// TestWhoAsksForOthersPods: whoever may make requests in a namespace of his own, for pods of other namespaces, uses up nothing of what
// these pods and their nodes have.
func TestWhoAsksForOthersPods(t *testing.T) {
	w := newWorld(t)
	victim := w.pod("1", nil, "/web")
	for range podBurst + 20 {
		w.request(victim, newKey(t), func(r *certificatesv1beta1.PodCertificateRequest) { r.Namespace = "evil" })
	}
	eventually(t, "refusals up to the burst", func() bool { return len(w.records("x509svid.refused")) >= podBurst })
	leafOf(t, w.answered(w.request(victim, newKey(t), nil)))
	if wait := w.signer.rates.wait("node one", "node one 1"); wait > 0 {
		t.Errorf("the pod waits for %v because of what others asked for", wait)
	}
}

// TestManyWait: one node, or one namespace, fills neither the room of the others nor the memory with requests, however large they are.
func TestManyWait(t *testing.T) {
	w := newWorld(t)
	w.pod("1", func(p *pods.Pod) { p.NodeName = "evil" })
	w.pod("2", nil)
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[types.NamespacedName]())
	defer queue.ShutDown()
	full := map[string]int{}
	held := newWaiting(queue, w.signer.whose, func(whose string) { full[whose]++ })
	put := func(i int, uid, node string) *certificatesv1beta1.PodCertificateRequest {
		r := &certificatesv1beta1.PodCertificateRequest{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprint(node, "-", uid, "-", i), ResourceVersion: "1", Annotations: map[string]string{"x": strings.Repeat("x", 1000)}},
			Spec: certificatesv1beta1.PodCertificateRequestSpec{SignerName: SignerName, PodUID: types.UID(uid), NodeName: types.NodeName(node), PKIXPublicKey: make([]byte, 10<<10), ProofOfPossession: make([]byte, 10<<10),
				UnverifiedUserAnnotations: map[string]string{AnnotationID: "/" + strings.Repeat("a", 100<<10)}}}
		held.Put(r)
		return r
	}
	var all []*certificatesv1beta1.PodCertificateRequest
	for i := range maxOfNode + 10 {
		all = append(all, put(i, "1", "evil"))
	}
	for i := range maxOfNamespace + 10 {
		all = append(all, put(i, "absent", "one"))
	}
	if full["node evil"] != 10 || full["namespace shop"] != 10 || len(held.requests) != maxOfNode+maxOfNamespace {
		t.Errorf("%v had no room, %d wait", full, len(held.requests))
	}
	all = append(all, put(0, "2", "one"))
	if r := held.get(types.NamespacedName{Namespace: "shop", Name: "one-2-0"}); r == nil {
		t.Error("there is no room for another node's")
	} else if n := r.Size(); n > 8<<10 {
		t.Errorf("a request that waits has %d bytes", n)
	} else if _, err := w.signer.wanted(r.Spec.UnverifiedUserAnnotations); err == nil {
		t.Error("an ID that is too long became one that is not")
	}
	held.Put(all[0]) // it changed
	for _, r := range all {
		held.Delete(r)
	}
	if len(held.requests)+len(held.of) != 0 {
		t.Errorf("left: %d requests, of %v", len(held.requests), held.of)
	}
}

// TestFlood: a node that floods the CA with requests keeps no other node waiting, and a flood of made-up names takes no
// memory without end.
func TestFlood(t *testing.T) {
	w := newWorld(t)
	bad := w.pod("1", func(p *pods.Pod) { p.NodeName, p.NodeUID = "evil", "node-9" }, "/web")
	for range podBurst + 20 {
		w.request(bad, newKey(t), func(r *certificatesv1beta1.PodCertificateRequest) { r.Spec.PKIXPublicKey = []byte("garbage") })
	}
	good := w.pod("2", nil, "/good")
	leafOf(t, w.answered(w.request(good, newKey(t), nil)))
	eventually(t, "refusals up to the pod's burst", func() bool { return len(w.records("x509svid.refused")) >= podBurst })

	now := time.Now()
	r := newRates(func() time.Time { return now })
	for i := range maxRates + 1000 {
		r.wait(fmt.Sprint("node", i), fmt.Sprint("pod", i))
	}
	if len(r.pods.by) > maxRates+1 || len(r.nodes.by) > maxRates+1 {
		t.Errorf("%d pods and %d nodes are told apart, want %d at most", len(r.pods.by), len(r.nodes.by), maxRates)
	}
	now = now.Add(time.Hour)
	if wait := r.wait("fresh", "fresh"); wait != 0 || len(r.pods.by) > 2 {
		t.Errorf("after the flood: wait %v, %d pods are remembered", wait, len(r.pods.by))
	}
}
