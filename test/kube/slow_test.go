//go:build kube

package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/signet-id/signet/ca/kube/publish"
)

// A mood is how an API server is at the moment.
type mood string

const (
	well     mood = "well"
	late     mood = "late"     // each answer begins after two seconds
	drips    mood = "drips"    // each answer comes in sixteen bytes at a time
	stalls   mood = "stalls"   // answers break off in the middle and are not continued, watches say half of an event
	expires  mood = "expires"  // what a watch asks for is always too old
	goesBack mood = "goesBack" // watches begin at a version of long ago
)

// moods let a test change it.
type moods struct {
	mu      sync.Mutex
	now     mood
	changed chan struct{}
	version string         // for goesBack
	asked   map[string]int // requests, by what is asked for, since the mood began
}

func (m *moods) be(now mood) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now, m.asked = now, map[string]int{}
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *moods) count(what string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.asked[what]
}

func (m *moods) serve(w http.ResponseWriter, r *http.Request, server http.Handler) {
	watch := r.URL.Query().Get("watch") != ""
	what := r.Method + " " + r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	if watch {
		what = "watch " + r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	}
	m.mu.Lock()
	now, changed, version := m.now, m.changed, m.version
	m.asked[what]++
	m.mu.Unlock()
	if watch { // with another mood they begin anew
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		r = r.WithContext(ctx)
		done := make(chan struct{})
		defer close(done)
		go func() {
			select {
			case <-changed:
				cancel()
			case <-done:
			}
		}()
	}
	switch now {
	case late:
		timer := time.NewTimer(2 * time.Second)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
			return
		}
	case drips:
		w = &dripping{w, r}
	case stalls:
		if watch {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"type":"ADDED","object":{"kind":`)
		} else {
			whole := httptest.NewRecorder()
			server.ServeHTTP(whole, r)
			for name, values := range whole.Header() {
				w.Header()[name] = values
			}
			w.WriteHeader(whole.Code)
			w.Write(whole.Body.Bytes()[:whole.Body.Len()/2])
		}
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
		case <-changed:
		}
		panic(http.ErrAbortHandler)
	case expires:
		if watch {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusGone)
			io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410,"message":"too old resource version"}`)
			return
		}
	case goesBack:
		if watch {
			q := r.URL.Query()
			q.Set("resourceVersion", version)
			r.URL.RawQuery = q.Encode()
		}
	}
	server.ServeHTTP(w, r)
}

// dripping writes a little at a time.
type dripping struct {
	http.ResponseWriter
	r *http.Request
}

func (d *dripping) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = d.ResponseWriter.Write(p[n:min(n+16, len(p))])
		n += m
		d.Flush()
		timer := time.NewTimer(time.Millisecond)
		select {
		case <-timer.C:
		case <-d.r.Context().Done():
			err = d.r.Context().Err()
		}
		timer.Stop()
	}
	return n, err
}

func (d *dripping) Flush() { d.ResponseWriter.(http.Flusher).Flush() }

// A CA with everything on at an API server that is slow in each way, or whose watches do not go on: pods get their identities, custom resources come into force, the bundle is
// published and Pod Certificates are signed, at once where the API server lets it and else when it is well again; no worker stays stuck, nothing piles up, and the Lease is given up only
// when it cannot be renewed.
func TestSlowAPIServer(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	k.allow()
	k.define()
	k.may("resources", resourceRules)
	k.may("sign", watchRules+`
- {apiGroups: [certificates.k8s.io], resources: [podcertificaterequests], verbs: [list, watch]}
- {apiGroups: [certificates.k8s.io], resources: [podcertificaterequests/status], verbs: [update]}
- {apiGroups: [certificates.k8s.io], resources: [signers], resourceNames: [signet-id.github.io/x509-svid], verbs: [sign]}`)
	node := k.namespace + "-node"
	uid := k.simulatedNode(node)
	admin := k.admin()
	m := &moods{now: well, changed: make(chan struct{}), asked: map[string]int{}}
	s, p := k.sceneOf("pods: {}, resources: {}, bundle: {}, pod_certificates: {}", "")
	// The door for attestation asks the API server too, and keeps its own way there.
	p.edit(func(config string) string {
		at := strings.Index(config, "kubernetes: {clusters: {prod: {kubeconfig: ") + len("kubernetes: {clusters: {prod: {kubeconfig: ")
		return config[:at] + k.between(m.serve) + config[at+strings.Index(config[at:], ","):]
	})
	p.start()
	s.mustCreate("Identity", "pods", "spiffeID: '/ns/{{ .k8s.ns }}/pod/{{ .k8s.pod }}'\nmatch: ['k8s:pod-label:app:simulated']\n'on': ['k8s_psat:cluster:prod']\n")
	s.accepted("Identity", "pods")
	agent := follow(t, ctx, p.Addr, k.agentToken("agent", node), p.roots())
	account, err := admin.CoreV1().ServiceAccounts(k.namespace).Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pkix, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	requests := admin.CertificatesV1beta1().PodCertificateRequests(k.namespace)

	var ids []string
	// happens makes one of everything, and returns what waits until the CA has done its part.
	happens := func(name string) (done func()) {
		t.Helper()
		pod := simulatedPod(k.namespace, name, node)
		pod.Spec.Volumes = []corev1.Volume{{Name: "svid", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{{
			PodCertificate: &corev1.PodCertificateProjection{SignerName: "signet-id.github.io/x509-svid", KeyType: "ECDSAP256", CredentialBundlePath: "credentials.pem"}}}}}}}
		made, err := admin.CoreV1().Pods(k.namespace).Create(ctx, pod, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, "/ns/"+k.namespace+"/pod/"+name)
		s.mustCreate("ClusterCallPolicy", name, "service: /web\nallow:\n- from: [/shop]\n")
		space := k.space(name, publish.Label+"=true")
		digest := sha256.Sum256([]byte(made.UID))
		proof, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		r, err := requests.Create(ctx, &certificatesv1beta1.PodCertificateRequest{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: certificatesv1beta1.PodCertificateRequestSpec{
			SignerName: "signet-id.github.io/x509-svid", PodName: made.Name, PodUID: made.UID, ServiceAccountName: "web", ServiceAccountUID: account.UID,
			NodeName: types.NodeName(node), NodeUID: types.UID(uid), PKIXPublicKey: pkix, ProofOfPossession: proof}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return func() {
			t.Helper()
			began := time.Now()
			agent.until(ctx, name+": the pod has its identity", ids...)
			s.accepted("ClusterCallPolicy", name)
			k.untilBundle(space, name+": the bundle is published", func(data map[string]string) bool { return strings.Contains(data[publish.PEMKey], "BEGIN CERTIFICATE") })
			for {
				now, err := requests.Get(ctx, r.Name, metav1.GetOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if c := now.Status.Conditions; len(c) > 0 {
					if c[0].Type != "Issued" {
						t.Errorf("%s: the certificate was not issued: %+v", name, c[0])
					}
					break
				}
				pause(t, ctx)
			}
			t.Logf("%s: everything is done after %v", name, time.Since(began).Round(100*time.Millisecond))
		}
	}
	said := func(what string) int { return strings.Count(p.Out.String(), what) }
	goroutines := func() (n int) {
		for l := range strings.Lines(p.page("/metrics")) {
			fmt.Sscanf(l, "go_goroutines %d", &n)
		}
		return n
	}
	list, err := admin.CoreV1().Pods(k.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m.version = list.ResourceVersion
	happens("well")()
	before, resident := goroutines(), mib(t, p.PID(), "VmRSS")

	for _, now := range []mood{late, drips, goesBack} {
		m.be(now)
		for w := m.count("watch pods"); now == goesBack && m.count("watch pods") == w; { // the watches that there are begin anew
			pause(t, ctx)
		}
		happens(strings.ToLower(string(now)))()
	}
	if n := said("has lost the lease"); n != 0 {
		t.Errorf("the Lease was lost %d times though it could be renewed", n)
	}

	m.be(stalls)
	done := happens("stalls")
	for said("has lost the lease") == 0 { // what leads stops when it cannot renew
		pause(t, ctx)
	}
	m.be(well)
	done()

	m.be(expires)
	done = happens("expires")
	for m.count("watch pods") < 4 {
		pause(t, ctx)
	}
	lists := m.count("GET pods")
	m.be(well)
	done()
	if lists > 6 {
		t.Errorf("%d lists of pods while four watches were too old", lists)
	}
	happens("again")()
	for n := 0; goroutines() > before+10; n++ { // what was under way has its bounds
		if n > 100 {
			t.Errorf("%d goroutines before and %d after", before, goroutines())
			break
		}
		pause(t, ctx)
	}
	t.Logf("resident %.1f MiB before and %.1f after, %d goroutines before and %d after", resident, mib(t, p.PID(), "VmRSS"), before, goroutines())
	if now := mib(t, p.PID(), "VmRSS"); now > resident+64 {
		t.Errorf("the CA grew from %.1f to %.1f MiB", resident, now)
	}
}
