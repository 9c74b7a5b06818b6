package k8spsat

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/test/cloudtest"
)

func TestAttest(t *testing.T) {
	s := cloudtest.NewKubernetes(t)
	want := &nodeattest.Evidence{
		Path: []string{"k8s_psat", "prod", "node-uid-1"},
		Selectors: []string{
			"cluster:prod", "agent_ns:signet", "agent_sa:agent", "agent_pod_name:agent-x1", "agent_pod_uid:pod-uid-1",
			"agent_node_ip:10.0.0.7", "agent_node_name:node1", "agent_node_uid:node-uid-1", "agent_node_label:zone:a", "agent_pod_label:app:agent",
		},
		CanReattest: true,
		Facts:       map[string]any{"cluster": "prod", "pod": "signet/agent-x1", "pod_uid": "pod-uid-1", "node": "node1", "credential_id": "JTI=1b4e28ba"},
	}
	got, err := attest(newAttestor(t, s), goodPayload)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("evidence (-want +got):\n%s", diff)
	}
	if _, err := got.Check(Type); err != nil {
		t.Errorf("evidence: %v", err)
	}

	got, err = attest(newAttestor(t, s, func(k *Cluster) { k.UsePodUID = true }), goodPayload)
	if err != nil || !slices.Equal(got.Path, []string{"k8s_psat", "prod", "pod", "pod-uid-1"}) {
		t.Errorf("with use_pod_uid: path %v, %v", got, err)
	}
}

// An API server before 1.30 says nothing of the node in the review.
func TestAttestOldServer(t *testing.T) {
	s := cloudtest.NewKubernetes(t)
	extra := s.Review["user"].(map[string]any)["extra"].(map[string]any)
	delete(extra, extraNode)
	delete(extra, extraNodeUID)
	delete(extra, extraID)
	if _, err := attest(newAttestor(t, s), goodPayload); err != nil {
		t.Error(err)
	}
}

func TestAttestRefusals(t *testing.T) {
	set := func(text string) map[string]any { return cloudtest.Object(t, text) }
	tests := []struct {
		name    string
		payload string
		change  func(*cloudtest.Kubernetes)
		kind    nodeattest.Kind
		want    string
		calls   int // at the API server, at most
	}{
		{name: "not JSON", payload: `cluster`, kind: nodeattest.Malformed, want: "not a JSON object"},
		{name: "more after it", payload: goodPayload + "{}", kind: nodeattest.Malformed, want: "not a JSON object"},
		{name: "the token twice", payload: `{"cluster":"prod","token":"a.b.c","token":"` + nodeToken + `"}`, kind: nodeattest.Malformed, want: "each once"},
		{name: "another case", payload: `{"cluster":"prod","Token":"` + nodeToken + `"}`, kind: nodeattest.Malformed, want: "missing token"},
		{name: "no cluster", payload: `{"token":"` + nodeToken + `"}`, kind: nodeattest.Malformed, want: "missing cluster"},
		{name: "no token", payload: `{"cluster":"prod"}`, kind: nodeattest.Malformed, want: "missing token"},
		{name: "other cluster", payload: `{"cluster":"test","token":"` + nodeToken + `"}`, kind: nodeattest.Malformed, want: `not configured for cluster "test"`},
		{name: "not a JWT", payload: `{"cluster":"prod","token":"abc"}`, kind: nodeattest.Malformed, want: "not a JWT"},
		{name: "a header in the token", payload: `{"cluster":"prod","token":"a.b.c\r\nX: y"}`, kind: nodeattest.Malformed, want: "not a JWT"},
		{name: "huge token", payload: `{"cluster":"prod","token":"a.b.` + strings.Repeat("c", MaxTokenBytes) + `"}`, kind: nodeattest.Malformed, want: "at most"},

		{name: "not authenticated", change: func(s *cloudtest.Kubernetes) {
			s.Review = set(`{"authenticated": false, "error": "token has expired ` + nodeToken + `"}`)
		},
			kind: nodeattest.Denied, want: "not authenticated", calls: 1},
		{name: "no verdict", change: func(s *cloudtest.Kubernetes) { s.Review = nil }, kind: nodeattest.Denied, want: "not authenticated", calls: 1},
		{name: "the server knows no audiences", change: func(s *cloudtest.Kubernetes) { delete(s.Review, "audiences") }, kind: nodeattest.Denied, want: "audiences", calls: 1},
		{name: "other audience", change: func(s *cloudtest.Kubernetes) { s.Review["audiences"] = []string{"vault"} }, kind: nodeattest.Denied, want: "audiences", calls: 1},
		{name: "a person", change: func(s *cloudtest.Kubernetes) { user(s)["username"] = "jane" }, kind: nodeattest.Denied, want: "not one of a service account", calls: 1},
		{name: "a name made to look so", change: func(s *cloudtest.Kubernetes) { user(s)["username"] = "x:y:signet:agent" }, kind: nodeattest.Denied, want: "not one of a service account", calls: 1},
		{name: "more parts", change: func(s *cloudtest.Kubernetes) { user(s)["username"] = "system:serviceaccount:signet:agent:x" }, kind: nodeattest.Denied, want: "not one of a service account", calls: 1},
		{name: "other service account", change: func(s *cloudtest.Kubernetes) { user(s)["username"] = "system:serviceaccount:signet:web" }, kind: nodeattest.Denied, want: `"signet:web" is not an allowed`, calls: 1},
		{name: "other namespace", change: func(s *cloudtest.Kubernetes) { user(s)["username"] = "system:serviceaccount:web:agent" }, kind: nodeattest.Denied, want: `"web:agent" is not an allowed`, calls: 1},
		{name: "not bound to a pod", change: func(s *cloudtest.Kubernetes) { user(s)["extra"] = map[string]any{} }, kind: nodeattest.Denied, want: "bound to a pod", calls: 1},
		{name: "no extras", change: func(s *cloudtest.Kubernetes) { delete(user(s), "extra") }, kind: nodeattest.Denied, want: "bound to a pod", calls: 1},
		{name: "no pod UID", change: func(s *cloudtest.Kubernetes) { delete(extra(s), extraPodUID) }, kind: nodeattest.Denied, want: "bound to a pod", calls: 1},
		{name: "two pods", change: func(s *cloudtest.Kubernetes) { extra(s)[extraPodName] = []string{"agent-x1", "agent-x2"} }, kind: nodeattest.Denied, want: "bound to a pod", calls: 1},
		{name: "a pod's name that leads elsewhere", change: func(s *cloudtest.Kubernetes) { extra(s)[extraPodName] = []string{"../../nodes"} }, kind: nodeattest.Denied, want: "bound to a pod", calls: 1},
		{name: "two nodes", change: func(s *cloudtest.Kubernetes) { extra(s)[extraNode] = []string{"node1", "node2"} }, kind: nodeattest.Denied, want: "bound to a pod", calls: 1},

		{name: "deleted pod", change: func(s *cloudtest.Kubernetes) { s.Pod = nil }, kind: nodeattest.Denied, want: "does not exist", calls: 2},
		{name: "another pod of that name", change: func(s *cloudtest.Kubernetes) { meta(s.Pod)["uid"] = "pod-uid-2" }, kind: nodeattest.Denied, want: "UID mismatch", calls: 2},
		{name: "a pod without UID", change: func(s *cloudtest.Kubernetes) { delete(meta(s.Pod), "uid") }, kind: nodeattest.Denied, want: "UID mismatch", calls: 2},
		{name: "a pod that was not asked for", change: func(s *cloudtest.Kubernetes) { meta(s.Pod)["name"] = "web" }, kind: nodeattest.Internal, want: "get the pod", calls: 2},
		{name: "the pod's service account", change: func(s *cloudtest.Kubernetes) { s.Pod["spec"].(map[string]any)["serviceAccountName"] = "web" }, kind: nodeattest.Denied, want: "does not run as", calls: 2},
		{name: "ended pod", change: func(s *cloudtest.Kubernetes) { s.Pod["status"].(map[string]any)["phase"] = "Failed" }, kind: nodeattest.Denied, want: "has ended", calls: 2},
		{name: "not scheduled", change: func(s *cloudtest.Kubernetes) { delete(s.Pod["spec"].(map[string]any), "nodeName") }, kind: nodeattest.Internal, want: "get the pod", calls: 2},
		{name: "no node IP", change: func(s *cloudtest.Kubernetes) { delete(s.Pod["status"].(map[string]any), "hostIP") }, kind: nodeattest.Internal, want: "get the pod", calls: 2},
		{name: "moved to another node", change: func(s *cloudtest.Kubernetes) { extra(s)[extraNode] = []string{"node2"} }, kind: nodeattest.Denied, want: "another node", calls: 2},

		{name: "no such node", change: func(s *cloudtest.Kubernetes) { s.Node = nil }, kind: nodeattest.Internal, want: "get the node", calls: 3},
		{name: "a node that was not asked for", change: func(s *cloudtest.Kubernetes) { meta(s.Node)["name"] = "node2" }, kind: nodeattest.Internal, want: "get the node", calls: 3},
		{name: "a node without UID", change: func(s *cloudtest.Kubernetes) { delete(meta(s.Node), "uid") }, kind: nodeattest.Internal, want: "get the node", calls: 3},
		{name: "a node UID with a slash", change: func(s *cloudtest.Kubernetes) { meta(s.Node)["uid"] = "a/b" }, kind: nodeattest.Internal, want: "get the node", calls: 3},
		{name: "a new node of that name", change: func(s *cloudtest.Kubernetes) { meta(s.Node)["uid"] = "node-uid-2" }, kind: nodeattest.Denied, want: "earlier node", calls: 3},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := cloudtest.NewKubernetes(t)
			if tt.change != nil {
				tt.change(s)
			}
			payload := tt.payload
			if payload == "" {
				payload = goodPayload
			}
			got, err := attest(newAttestor(t, s), payload)
			if err == nil {
				t.Fatalf("let in as %v", got.Path)
			}
			r := refusal(t, err)
			if r.Kind != tt.kind || !strings.Contains(r.Text, tt.want) {
				t.Errorf("refused with kind %d, %q; want kind %d and %q", r.Kind, r.Text, tt.kind, tt.want)
			}
			if n := len(s.Called()); n != tt.calls {
				t.Errorf("%d calls of the API server, want %d: %q", n, tt.calls, s.Called())
			}
		})
	}
}

func user(s *cloudtest.Kubernetes) map[string]any  { return s.Review["user"].(map[string]any) }
func extra(s *cloudtest.Kubernetes) map[string]any { return user(s)["extra"].(map[string]any) }
func meta(o map[string]any) map[string]any {
	return o["metadata"].(map[string]any)
}

// A flood takes the seats of its own cluster only, and whoever waits is told to come back.
func TestSeatsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &cluster{name: "prod", slots: make(chan struct{}, maxAtOnce)}
		for range maxAtOnce {
			if err := k.enter(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if r := refusal(t, k.enter(t.Context())); r.Kind != nodeattest.Unavailable {
			t.Errorf("refused with kind %d, want Unavailable", r.Kind)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := k.enter(ctx); err == nil {
			t.Error("a caller that is gone got a seat")
		}
		k.leave()
		if err := k.enter(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestConfigCheck(t *testing.T) {
	good := Cluster{ServiceAccounts: []string{"signet:agent"}}
	tests := []struct {
		name   string
		config Config
		want   string
	}{
		{name: "good", config: Config{Clusters: map[string]Cluster{"prod": good}}},
		{name: "none", want: "clusters: missing"},
		{name: "a name with a slash", config: Config{Clusters: map[string]Cluster{"a/b": good}}, want: "cannot be a cluster's name"},
		{name: "dots", config: Config{Clusters: map[string]Cluster{"..": good}}, want: "cannot be a cluster's name"},
		{name: "nobody", config: Config{Clusters: map[string]Cluster{"prod": {}}}, want: "clusters.prod.service_accounts: missing"},
		{name: "no namespace", config: Config{Clusters: map[string]Cluster{"prod": {ServiceAccounts: []string{"agent"}}}}, want: "namespace:name"},
		{name: "anybody", config: Config{Clusters: map[string]Cluster{"prod": {ServiceAccounts: []string{"signet:*"}}}}, want: "namespace:name"},
		{name: "relative", config: Config{Clusters: map[string]Cluster{"prod": {ServiceAccounts: good.ServiceAccounts, Kubeconfig: "k"}}}, want: "absolute"},
		{name: "empty audience", config: Config{Clusters: map[string]Cluster{"prod": {ServiceAccounts: good.ServiceAccounts, Audiences: []string{""}}}}, want: "empty"},
		{name: "empty label", config: Config{Clusters: map[string]Cluster{"prod": {ServiceAccounts: good.ServiceAccounts, NodeLabels: []string{""}}}}, want: "key of a label"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var told []string
			tt.config.Check(tell(&told))
			got := strings.Join(told, "\n")
			if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("Check tells %q, want %q", got, tt.want)
			}
		})
	}
}

// What parses is what was sent, and nothing that a header or a URL could be made of.
func FuzzPayload(f *testing.F) {
	for _, seed := range []string{goodPayload, `{}`, `{"cluster":"prod","token":"a.b.c","x":[1]}`, `{"cluster":"a","cluster":"b","token":"a.b.c"}`, `[`, `{"token":"a.b.c","cluster":"\u0000"}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cluster, token, err := parsePayload(data)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Fatalf("the error %q has a line break", err)
			}
			return
		}
		if cluster == "" || strings.Count(token, ".") != 2 || strings.ContainsAny(token, " \r\n\"\x00") {
			t.Fatalf("parsePayload(%q) = %q, %q", data, cluster, token)
		}
		var again struct {
			Cluster string `json:"cluster"`
			Token   string `json:"token"`
		}
		if json.Unmarshal(data, &again); again.Token != token { // the standard library takes the last, and any case
			if !strings.Contains(strings.ToLower(string(data)), "token") {
				t.Fatalf("parsePayload(%q) found token %q, encoding/json %q", data, token, again.Token)
			}
		}
	})
}

// Whatever an API server answers, who comes out can be asked for in a URL as he is.
func FuzzReview(f *testing.F) {
	f.Add([]byte(`{"authenticated":true,"user":{"username":"system:serviceaccount:a:b","extra":{"authentication.kubernetes.io/pod-name":["p"],"authentication.kubernetes.io/pod-uid":["u"]}}}`))
	f.Add([]byte(`{"user":{"username":"system:serviceaccount:a/../b:c"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r tokenReviewJSON
		if json.Unmarshal(data, &r) != nil {
			return
		}
		h, err := r.holder()
		if err != nil {
			return
		}
		for _, s := range []string{h.namespace, h.serviceAccount, h.podName, h.podUID} {
			if s == "" || strings.ContainsAny(s, "/?#% :\r\n") {
				t.Fatalf("holder of %q is %+v", data, h)
			}
		}
		if r.User.Username != userPrefix+h.namespace+":"+h.serviceAccount {
			t.Fatalf("holder of user %q is %+v", r.User.Username, h)
		}
	})
}
