package broker_test

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/broker"
	"github.com/signet-id/signet/workloadapi/broker/internal/brokertest"
)

func statusCode(err error) codes.Code { return status.Code(err) }

const podUID, otherUID = "a1b2c3d4-e5f6-7890-abcd-ef1234567890", "0fa1b2c3-4d5e-6f70-8192-a3b4c5d6e7f8"

func podSelectors(ns, name string) []spiffe.Selector {
	return []spiffe.Selector{{Type: "k8s", Value: "ns:" + ns}, {Type: "k8s", Value: "pod-name:" + name}}
}

// onePod has an endpoint and the pod shop/checkout, which is entitled to /checkout.
func onePod(t testing.TB, adjust ...func(*broker.Config)) (*brokertest.Authority, *brokertest.Source, *brokertest.Pods, *brokertest.Endpoint) {
	t.Helper()
	a := brokertest.NewAuthority(t, "example.org")
	src := brokertest.NewSource(a, brokertest.Entry{Selector: "k8s:pod-name:checkout", Identity: a.Identity(t, "/checkout")})
	pods := &brokertest.Pods{}
	pods.Put("shop/checkout", broker.Pod{UID: podUID, Selectors: podSelectors("shop", "checkout")})
	return a, src, pods, brokertest.Serve(t, src, append([]func(*broker.Config){func(c *broker.Config) { c.Pods = pods }}, adjust...)...)
}

// TestBAPI_01_Profiles: both profiles are there, and each can be turned off.
func TestBAPI_01_Profiles(t *testing.T) {
	for _, tt := range []struct {
		name   string
		adjust func(*broker.Config)
		off    map[string]bool
	}{
		{"both", func(*broker.Config) {}, nil},
		{"no X.509", func(c *broker.Config) { c.DisableX509 = true }, map[string]bool{"SubscribeToX509SVID": true, "SubscribeToX509Bundles": true}},
		{"no JWT", func(c *broker.Config) { c.DisableJWT = true }, map[string]bool{"FetchJWTSVID": true, "SubscribeToJWTBundles": true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, _, e, w := oneWorkload(t, tt.adjust)
			for name, call := range calls(t, asBroker(t, e, a), pidRef(t, w.PID)) {
				want := codes.OK
				if tt.off[name] {
					want = codes.Unimplemented
				}
				if got := status.Code(call(header(t))); got != want {
					t.Errorf("%s = %v, want %v", name, got, want)
				}
			}
		})
	}
}

// TestBAPI_06_BAPI_11_V146_DeadProcess: the endpoint looks itself whether a process exists; a zombie, a thread and a free id do not.
func TestBAPI_06_BAPI_11_V146_DeadProcess(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	c := asBroker(t, e, a)
	w.Kill()
	for name, call := range calls(t, c, pidRef(t, w.PID)) {
		t.Run(name, func(t *testing.T) {
			wantInfo(t, call(header(t)), codes.NotFound, "WORKLOAD_NOT_FOUND", map[string]string{"pid": itoa(w.PID)})
		})
	}
	t.Run("a thread", func(t *testing.T) {
		tid := int32(0)
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			if task.Name() != itoa(int32(os.Getpid())) {
				tid = atoi(t, task.Name())
			}
		}
		wantInfo(t, calls(t, c, pidRef(t, tid))["FetchJWTSVID"](header(t)), codes.NotFound, "WORKLOAD_NOT_FOUND", nil)
	})
	src.Look(func() {
		if len(src.Seen) > 0 {
			t.Errorf("the source was asked about %d processes that do not exist", len(src.Seen))
		}
	})
}

// TestBAPI_07_NothingOfTheRequestIsBelieved: selectors are what attestation says, whatever else is in a reference.
func TestBAPI_07_NothingOfTheRequestIsBelieved(t *testing.T) {
	a, src, pods, e := onePod(t)
	c := asBroker(t, e, a)
	pods.Put("shop/checkout", broker.Pod{UID: podUID, Selectors: []spiffe.Selector{{Type: "k8s", Value: "ns:elsewhere"}, {Type: "k8s", Value: "pod-name:checkout"}}})
	subscribe(t, c, podRef(t, "shop", "checkout", strings.ToUpper(podUID)))
	w := brokertest.Start(t)
	src.Change(func() {
		src.Entries = append(src.Entries, brokertest.Entry{Selector: selector(w), Identity: a.Identity(t, "/web")})
	})
	subscribe(t, c, pidRef(t, w.PID))
	src.Look(func() {
		if got := len(src.Seen); got != 2 {
			t.Fatalf("the source saw %d callers, want 2", got)
		}
		for _, s := range src.Seen[0].Selectors {
			if s.String() != "k8s:ns:elsewhere" && s.String() != "k8s:pod-name:checkout" {
				t.Errorf("the pod was looked up by %s, which the kubelet does not say", s)
			}
		}
		if got, want := src.Seen[1].UID, uint32(os.Getuid()); got != want || src.Seen[1].PID != w.PID {
			t.Errorf("the process was looked up as uid %d pid %d", got, src.Seen[1].PID)
		}
		for _, s := range src.Seen[1].Selectors {
			if !strings.HasPrefix(s.String(), "test:") {
				t.Errorf("the process was looked up by %s, which attestation does not say", s)
			}
		}
	})
}

// TestBAPI_08_ProcessIDsStayOnTheNode: over TCP a process id is refused, from another host always.
func TestBAPI_08_ProcessIDsStayOnTheNode(t *testing.T) {
	for _, tt := range []struct {
		name  string
		allow bool
		far   bool
		want  codes.Code
	}{
		{"loopback, not allowed", false, false, codes.PermissionDenied},
		{"loopback, allowed", true, false, codes.OK},
		{"elsewhere, not allowed", false, true, codes.PermissionDenied},
		{"elsewhere, allowed for loopback", true, true, codes.PermissionDenied},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, src, e, w := oneWorkload(t, func(c *broker.Config) {
				c.Brokers[0].PIDOverLoopback = tt.allow
				if tt.far {
					c.Listeners[1] = farAway{c.Listeners[1]}
				}
			})
			c := brokerpb.NewAPIClient(dial(t, e.TCP.String(), clientTLS(always(a.SVID(t, brokertest.BrokerPath, time.Hour)))))
			for name, call := range calls(t, c, pidRef(t, w.PID)) {
				if err := call(header(t)); status.Code(err) != tt.want {
					t.Errorf("%s = %v, want %v", name, err, tt.want)
				}
			}
			src.Look(func() {
				if (len(src.Seen) > 0) != (tt.want == codes.OK) {
					t.Errorf("the source was asked about %d callers", len(src.Seen))
				}
			})
		})
	}
}

// TestBAPI_09_ObjectsOfThisClusterAlone: an object is one that this node's own control plane has; a UID of another
// cluster names nothing, and the type of reference works from another host.
func TestBAPI_09_ObjectsOfThisClusterAlone(t *testing.T) {
	a, _, _, e := onePod(t, func(c *broker.Config) { c.Listeners[1] = farAway{c.Listeners[1]} })
	c := brokerpb.NewAPIClient(dial(t, e.TCP.String(), clientTLS(always(a.SVID(t, brokertest.BrokerPath, time.Hour)))))
	subscribe(t, c, podRef(t, "shop", "checkout", podUID))
	for _, ref := range []*brokerpb.WorkloadReference{podRef(t, "", "", otherUID), podRef(t, "shop", "cart", "")} {
		wantInfo(t, calls(t, c, ref)["SubscribeToX509SVID"](header(t)), codes.NotFound, "WORKLOAD_NOT_FOUND", nil)
	}
}

// TestBAPI_10_SandboxIsNotTheWorkload: a process id means that very process; its parent's identities are not its own.
func TestBAPI_10_SandboxIsNotTheWorkload(t *testing.T) {
	a, _, e, _ := oneWorkload(t)
	sandbox := brokertest.Start(t) // beside the workload, same user and program
	wantInfo(t, calls(t, asBroker(t, e, a), pidRef(t, sandbox.PID))["SubscribeToX509SVID"](header(t)), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED", nil)
}

// TestBAPI_11_ReusedProcessID: when a process has ended and its id is another's, the subscription has ended and brings
// nothing of the other, and a new one is for the other.
func TestBAPI_11_ReusedProcessID(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to choose a process id")
	}
	a, src, e, w := oneWorkload(t)
	c := asBroker(t, e, a)
	stream, _ := subscribe(t, c, pidRef(t, w.PID))
	w.Kill()
	var second *brokertest.Workload
	for range 200 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(itoa(w.PID-1)), 0); err != nil {
			t.Fatal(err)
		}
		if second = brokertest.Start(t); second.PID == w.PID {
			break
		}
		second.Kill()
	}
	if second.PID != w.PID {
		t.Fatalf("process id %d could not be had again", w.PID)
	}
	src.Change(func() { src.Entries[0].Identity = a.Identity(t, "/second") })
	wantInfo(t, ended(stream), codes.NotFound, "WORKLOAD_NOT_FOUND", nil)
	if _, m := subscribe(t, c, pidRef(t, second.PID)); ids(m) != "/second" {
		t.Errorf("the new process gets %q, want /second", ids(m))
	}
}

// TestBAPI_16_NameWithAnotherUID: a pod that was made anew under its name is not the one that was meant.
func TestBAPI_16_NameWithAnotherUID(t *testing.T) {
	a, _, _, e := onePod(t)
	c := asBroker(t, e, a)
	for name, call := range calls(t, c, podRef(t, "shop", "checkout", otherUID)) {
		t.Run(name, func(t *testing.T) {
			wantInfo(t, call(header(t)), codes.NotFound, "WORKLOAD_NOT_FOUND", map[string]string{"namespace": "shop", "name": "checkout", "uid": otherUID})
		})
	}
	subscribe(t, c, podRef(t, "shop", "checkout", podUID))
	subscribe(t, c, podRef(t, "", "", podUID))
	subscribe(t, c, podRef(t, "shop", "checkout", ""))
}

// TestBAPI_17_NoKubernetesHere: a type of the standard that nothing here resolves is not understood (DEC-15).
func TestBAPI_17_NoKubernetesHere(t *testing.T) {
	a, _, e, _ := oneWorkload(t)
	for name, call := range calls(t, asBroker(t, e, a), podRef(t, "shop", "checkout", podUID)) {
		t.Run(name, func(t *testing.T) {
			wantInfo(t, call(header(t)), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID", nil)
		})
	}
}

// TestBAPI_18_BAPI_19_V147_Statuses: each failure has its code, its reason and the domain of the standard; a live process
// without an entry is not entitled, also when it loses its entry.
func TestBAPI_18_BAPI_19_V147_Statuses(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	c := asBroker(t, e, a)
	unknown := brokertest.Start(t)
	for name, call := range calls(t, c, pidRef(t, unknown.PID)) {
		t.Run(name, func(t *testing.T) {
			wantInfo(t, call(header(t)), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED", map[string]string{"pid": itoa(unknown.PID)})
		})
	}
	stream, _ := subscribe(t, c, pidRef(t, w.PID))
	src.Change(func() { src.Entries = nil })
	wantInfo(t, ended(stream), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED", map[string]string{"pid": itoa(w.PID)})
	w.Kill()
	wantInfo(t, calls(t, c, pidRef(t, w.PID))["FetchJWTSVID"](header(t)), codes.NotFound, "WORKLOAD_NOT_FOUND", map[string]string{"pid": itoa(w.PID)})
	wantInfo(t, calls(t, c, pidRef(t, -1))["FetchJWTSVID"](header(t)), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID", map[string]string{"field": "pid"})
}

// TestBAPI_22_LimitsOfABroker: what a broker may name, ask for and get can be narrowed.
func TestBAPI_22_LimitsOfABroker(t *testing.T) {
	limit := func(f func(*broker.Broker)) func(*broker.Config) {
		return func(c *broker.Config) { f(&c.Brokers[0]) }
	}
	t.Run("types of references", func(t *testing.T) {
		a, _, _, e := onePod(t, limit(func(b *broker.Broker) { b.References = []broker.ReferenceType{broker.PID} }))
		wantCode(t, calls(t, asBroker(t, e, a), podRef(t, "", "", podUID))["SubscribeToX509SVID"](header(t)), codes.PermissionDenied, "references of type kubernetes")
		a, _, e, w := oneWorkload(t, limit(func(b *broker.Broker) { b.References = []broker.ReferenceType{broker.Kubernetes} }))
		wantCode(t, calls(t, asBroker(t, e, a), pidRef(t, w.PID))["SubscribeToX509SVID"](header(t)), codes.PermissionDenied, "references of type pid")
	})
	t.Run("namespaces", func(t *testing.T) {
		a, _, pods, e := onePod(t, limit(func(b *broker.Broker) { b.Namespaces = []string{"shop"} }))
		pods.Put("bank/checkout", broker.Pod{UID: otherUID, Selectors: podSelectors("bank", "checkout")})
		c := asBroker(t, e, a)
		subscribe(t, c, podRef(t, "shop", "checkout", podUID))
		wantCode(t, calls(t, c, podRef(t, "bank", "checkout", otherUID))["SubscribeToX509SVID"](header(t)), codes.PermissionDenied, "bank")
		wantCode(t, calls(t, c, podRef(t, "", "", otherUID))["SubscribeToX509SVID"](header(t)), codes.PermissionDenied, "namespace")
		wantInfo(t, calls(t, c, podRef(t, "shop", "checkout", otherUID))["SubscribeToX509SVID"](header(t)), codes.NotFound, "WORKLOAD_NOT_FOUND", nil)
	})
	t.Run("audiences", func(t *testing.T) {
		a, _, e, w := oneWorkload(t, limit(func(b *broker.Broker) { b.Audiences = []string{"shop", "bank"} }))
		c := asBroker(t, e, a)
		for _, tt := range []struct {
			audience []string
			want     codes.Code
		}{{[]string{"shop"}, codes.OK}, {[]string{"bank", "shop"}, codes.OK}, {[]string{"vault"}, codes.PermissionDenied}, {[]string{"shop", "vault"}, codes.PermissionDenied}} {
			_, err := c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, w.PID), Audience: tt.audience})
			if status.Code(err) != tt.want {
				t.Errorf("audience %q: %v, want %v", tt.audience, err, tt.want)
			}
		}
	})
	t.Run("SPIFFE IDs", func(t *testing.T) {
		a, src, e, w := oneWorkload(t, limit(func(b *broker.Broker) { b.IDs = []string{"spiffe://example.org/shop/**"} }))
		c := asBroker(t, e, a)
		for name, call := range calls(t, c, pidRef(t, w.PID)) {
			if err := call(header(t)); status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s for a workload with /web alone = %v, want PermissionDenied", name, err)
			}
		}
		src.Change(func() {
			src.Entries = append(src.Entries, brokertest.Entry{Selector: selector(w), Identity: a.Identity(t, "/shop/cart")})
		})
		if _, m := subscribe(t, c, pidRef(t, w.PID)); ids(m) != "/shop/cart" {
			t.Errorf("the broker gets %q, want /shop/cart alone", ids(m))
		}
		resp, err := c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, w.PID), Audience: []string{"a"}})
		if err != nil || len(resp.Svids) != 1 || resp.Svids[0].SpiffeId != "spiffe://example.org/shop/cart" {
			t.Errorf("JWT-SVIDs: %v, %v; want one for /shop/cart", resp, err)
		}
		_, err = c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, w.PID), Audience: []string{"a"}, SpiffeId: "spiffe://example.org/web"})
		wantInfo(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED", nil)
	})
}

// TestPrivilegedIdentitiesStayWithTheWorkload: no broker gets what opens doors at the CA, not under another entry either.
func TestPrivilegedIdentitiesStayWithTheWorkload(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	admin := a.Identity(t, "/admin")
	admin.Privileged = true
	src.Change(func() {
		src.Entries = append(src.Entries, brokertest.Entry{Selector: selector(w), Identity: admin}, brokertest.Entry{Selector: selector(w), Identity: a.Identity(t, "/admin")})
	})
	c := asBroker(t, e, a)
	if _, m := subscribe(t, c, pidRef(t, w.PID)); ids(m) != "/web" {
		t.Errorf("the broker gets %q, want /web alone", ids(m))
	}
	resp, err := c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, w.PID), Audience: []string{"a"}})
	if err != nil || len(resp.Svids) != 1 {
		t.Errorf("JWT-SVIDs: %v, %v; want one", resp, err)
	}
	_, err = c.FetchJWTSVID(header(t), &brokerpb.FetchJWTSVIDRequest{Reference: pidRef(t, w.PID), Audience: []string{"a"}, SpiffeId: "spiffe://example.org/admin"})
	wantInfo(t, err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED", nil)
}

// TestBAPI_23_BAPI_25_OneConnectionManyWorkloads: each stream has its own workload's data and all of it, at once.
func TestBAPI_23_BAPI_25_OneConnectionManyWorkloads(t *testing.T) {
	a, src, e, w := oneWorkload(t)
	other := brokertest.Start(t)
	partner := brokertest.NewAuthority(t, "partner.example")
	federated := a.Identity(t, "/other")
	federated.FederatesWith = []spiffeid.TrustDomain{partner.TD}
	src.Change(func() {
		src.Bundles[partner.TD] = partner
		src.Entries = append(src.Entries, brokertest.Entry{Selector: selector(other), Identity: federated}, brokertest.Entry{Selector: selector(other), Identity: a.Identity(t, "/more")})
	})
	c := asBroker(t, e, a)
	web, m1 := subscribe(t, c, pidRef(t, w.PID))
	more, m2 := subscribe(t, c, pidRef(t, other.PID))
	if ids(m1) != "/web" || len(m1.FederatedBundles) != 0 || ids(m2) != "/other /more" || len(m2.FederatedBundles) != 1 {
		t.Fatalf("first messages: %q with %d federated bundles, %q with %d", ids(m1), len(m1.FederatedBundles), ids(m2), len(m2.FederatedBundles))
	}
	renewed := a.Identity(t, "/more")
	src.Change(func() { src.Entries[2].Identity = renewed })
	m2 = recv(t, more)
	if ids(m2) != "/other /more" || !bytes.Equal(m2.Svids[1].X509Svid, renewed.Chain) || !bytes.Equal(m2.Svids[0].X509Svid, federated.Chain) {
		t.Errorf("after one of two was renewed: %q; want both, the second renewed", ids(m2))
	}
	// Nothing of that came to the first stream: the next there is its own change.
	mine := a.Identity(t, "/web")
	src.Change(func() { src.Entries[0].Identity = mine })
	if m1 = recv(t, web); !bytes.Equal(m1.Svids[0].X509Svid, mine.Chain) {
		t.Error("the first stream has another message than its own renewal")
	}
}

// TestBAPI_28_EmptyAudience and what else a request for tokens may not say.
func TestBAPI_28_EmptyAudience(t *testing.T) {
	a, _, e, w := oneWorkload(t)
	c := asBroker(t, e, a)
	for name, req := range map[string]*brokerpb.FetchJWTSVIDRequest{
		"no audience":    {},
		"empty audience": {Audience: []string{"a", ""}},
		"bad spiffe_id":  {Audience: []string{"a"}, SpiffeId: "https://example.org/web"},
		"no path":        {Audience: []string{"a"}, SpiffeId: "spiffe://example.org"},
	} {
		req.Reference = pidRef(t, w.PID)
		_, err := c.FetchJWTSVID(header(t), req)
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
}

// TestBAPI_29_BAPI_30_StreamsEndWithTheWorkload: in each of the three ways in which a workload stops, and the connection
// goes on for others.
func TestBAPI_29_BAPI_30_StreamsEndWithTheWorkload(t *testing.T) {
	prompt := func(t *testing.T, stop func(), stream interface {
		Recv() (*brokerpb.SubscribeToX509SVIDResponse, error)
	}) {
		t.Helper()
		began := time.Now()
		stop()
		_, err := stream.Recv()
		wantInfo(t, err, codes.NotFound, "WORKLOAD_NOT_FOUND", nil)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("the stream ended after %s, want within 5s", took)
		}
	}
	t.Run("the process ends", func(t *testing.T) {
		a, src, e, w := oneWorkload(t)
		c := asBroker(t, e, a)
		other := brokertest.Start(t)
		src.Change(func() {
			src.Entries = append(src.Entries, brokertest.Entry{Selector: selector(other), Identity: a.Identity(t, "/other")})
		})
		stays, _ := subscribe(t, c, pidRef(t, other.PID))
		ends, _ := subscribe(t, c, pidRef(t, w.PID))
		prompt(t, w.Kill, ends)
		src.Change(func() { src.Entries[1].Identity = a.Identity(t, "/other") })
		if m := recv(t, stays); ids(m) != "/other" {
			t.Errorf("the other workload's stream has %q", ids(m))
		}
	})
	for _, ref := range []struct{ name, ns, pod, uid string }{{"named", "shop", "checkout", ""}, {"by UID", "", "", podUID}, {"by both", "shop", "checkout", podUID}} {
		t.Run("the pod is gone, "+ref.name, func(t *testing.T) {
			t.Parallel()
			a, _, pods, e := onePod(t)
			stream, _ := subscribe(t, asBroker(t, e, a), podRef(t, ref.ns, ref.pod, ref.uid))
			prompt(t, func() { pods.Put("shop/checkout", broker.Pod{}) }, stream)
		})
		t.Run("another pod has the name, "+ref.name, func(t *testing.T) {
			t.Parallel()
			a, _, pods, e := onePod(t)
			stream, _ := subscribe(t, asBroker(t, e, a), podRef(t, ref.ns, ref.pod, ref.uid))
			prompt(t, func() {
				pods.Put("shop/checkout", broker.Pod{UID: otherUID, Selectors: podSelectors("shop", "checkout")})
			}, stream)
		})
	}
}

// TestKubeletOutage: while the kubelet cannot be asked nobody is told that a pod does not exist, and nothing is pushed for
// it: the broker keeps what it has, and comes back.
func TestKubeletOutage(t *testing.T) {
	a, src, pods, e := onePod(t)
	c := asBroker(t, e, a)
	pods.Fail(errors.New("connection refused"))
	wantCode(t, calls(t, c, podRef(t, "", "", podUID))["SubscribeToX509SVID"](header(t)), codes.Unavailable)
	pods.Fail(nil)
	stream, _ := subscribe(t, c, podRef(t, "", "", podUID))
	pods.Fail(errors.New("connection refused"))
	src.Change(func() { src.Entries[0].Identity = a.Identity(t, "/checkout") })
	wantCode(t, ended(stream), codes.Unavailable)
	if !strings.Contains(e.Log.String(), "connection refused") {
		t.Error("the log does not say why")
	}
	pods.Fail(nil)
	subscribe(t, c, podRef(t, "", "", podUID))
}

// TestPodThatChanges: a pod that has other selectors at the next push goes on with what these give it.
func TestPodThatChanges(t *testing.T) {
	a, src, pods, e := onePod(t)
	stream, _ := subscribe(t, asBroker(t, e, a), podRef(t, "shop", "checkout", ""))
	pods.Put("shop/checkout", broker.Pod{UID: podUID, Selectors: podSelectors("shop", "other")})
	src.Change(func() {
		src.Entries[0].Identity = a.Identity(t, "/checkout")
		src.Entries = append(src.Entries, brokertest.Entry{Selector: "k8s:pod-name:other", Identity: a.Identity(t, "/relabelled")})
	})
	if m := recv(t, stream); ids(m) != "/relabelled" {
		t.Errorf("the stream goes on with %q, want /relabelled", ids(m))
	}
}

func atoi(t testing.TB, s string) int32 {
	t.Helper()
	n := int32(0)
	for _, c := range s {
		n = n*10 + (c - '0')
	}
	return n
}
