package why

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
)

var (
	asked    = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	here     = &adminv1.NodeAgent{Id: "spiffe://example.org/spire/agent/k8s_psat/prod/n1", ExpiresAt: timestamppb.New(asked.Add(time.Hour))}
	watched  = []*adminv1.WatchedCluster{{Name: "prod", Synced: true}}
	gives    = &adminv1.PodRule{Rule: "Identity shop", EntryId: "signet.pod.prod.shop.1", SpiffeId: "spiffe://example.org/web"}
	inSync   = &agentv1.GetStatusResponse{Id: here.Id, TrustDomain: "example.org", Attestor: "k8s_psat", Revision: 7, State: "in sync", Ca: &agentv1.CA{Connected: true}, Now: timestamppb.New(asked)}
	ofThePod = []*agentv1.Method{{Name: "k8s", Selectors: []string{"k8s:ns:prod", "k8s:pod-name:web-0", "k8s:pod-uid:u1"}}}
)

func podOn(change func(*adminv1.ExplainedPod)) *adminv1.ExplainedPod {
	x := &adminv1.ExplainedPod{Cluster: "prod", Namespace: "prod", Name: "web-0", Uid: "u1", State: stateKnown, NodeName: "n1", NodeUid: "n1", Agents: []*adminv1.NodeAgent{here}, Rules: []*adminv1.PodRule{gives}}
	if change != nil {
		change(x)
	}
	return x
}

func rules(all ...*adminv1.PodRule) func(*adminv1.ExplainedPod) {
	return func(x *adminv1.ExplainedPod) { x.Rules = all }
}

func differing(want, kind string, have ...string) *adminv1.PodRule {
	return &adminv1.PodRule{Rule: "ClusterSPIFFEID web", Differences: []*adminv1.PodDifference{{Want: want, Kind: kind, Have: have}}}
}

// TestPodCauses has what test/why does not build: states that last for a moment, and custom resources.
func TestPodCauses(t *testing.T) {
	for _, tt := range []struct {
		name     string
		clusters []*adminv1.WatchedCluster
		pod      *adminv1.ExplainedPod
		agent    *agentv1.GetStatusResponse
		failed   error
		want     Code
		says     string
	}{
		{name: "given, at the CA", pod: podOn(nil), want: Served, says: "spiffe://example.org/web by Identity shop"},
		{name: "given, and the agent found no process", pod: podOn(nil), agent: inSync, failed: status.Error(codes.NotFound, "none runs"), want: ProcessGone, says: "none runs"},
		{name: "the agent's SVID has ended", pod: podOn(func(x *adminv1.ExplainedPod) {
			x.Agents = []*adminv1.NodeAgent{{Id: here.Id, ExpiresAt: timestamppb.New(asked.Add(-time.Minute))}}
		}), want: AgentSVIDExpired, says: "2025-12-31T23:59:00Z"},
		{name: "one agent has ended, another has come", pod: podOn(func(x *adminv1.ExplainedPod) {
			x.Agents = []*adminv1.NodeAgent{{Id: "spiffe://example.org/old", ExpiresAt: timestamppb.New(asked.Add(-time.Minute))}, here}
		}), want: Served},
		{name: "the template has ended", pod: podOn(rules(&adminv1.PodRule{Rule: "Identity shop", Expired: true})), want: EntryExpired, says: "expiresAt"},
		{name: "the namespace is not known", pod: podOn(func(x *adminv1.ExplainedPod) { x.NodeUid, x.Unplaced = "", "namespace_unknown" }), want: PodNotSeen, says: "namespace"},
		{name: "the API server cannot be asked", pod: podOn(func(x *adminv1.ExplainedPod) { x.State, x.Detail = "unclear", "connection refused" }), want: PodUnknown, says: "connection refused"},
		{name: "a state of a newer CA", pod: podOn(func(x *adminv1.ExplainedPod) { x.State = "frozen" }), want: PodUnknown},
		{name: "known, of a cluster that is not all known", clusters: []*adminv1.WatchedCluster{{Name: "prod", Problem: "cluster prod: its pods are not known: away"}}, pod: podOn(nil), want: ClusterNotSynced, says: "of cluster prod now: its pods are not known: away"},
		{name: "no rule at all", pod: podOn(rules()), want: NoEntry, says: "cluster prod"},
		{name: "a ClusterSPIFFEID with a typing error", pod: podOn(rules(differing("k8s:pod-label:app:wbe", "typo", "k8s:pod-label:app:web"))), want: Typo, says: "kubectl get clusterspiffeid web -o yaml"},
		{name: "one of other labels", pod: podOn(rules(differing("podSelector: app in (a,b)", "value", "k8s:pod-label:app:web"))), want: LabelDiffers, says: "app in (a,b)"},
		{name: "one that wants a label", pod: podOn(rules(differing("namespaceSelector: team", "absent"))), want: LabelMissing, says: "namespaceSelector: team"},
		{name: "one whose namespaces are passed over", pod: podOn(rules(differing("a namespace that ignore_namespaces does not name", "value", "k8s:ns:prod"))), want: NamespaceDiffers, says: "ignore_namespaces"},
		{name: "a kind of a newer CA", pod: podOn(rules(differing("k8s:moon:full", "sideways", "k8s:moon:new"))), want: SelectorDiffers, says: "k8s:moon:new"},
		{name: "refused, though another one gives it something", pod: podOn(rules(gives, &adminv1.PodRule{Rule: "Identity b", Refused: ".k8s.label is empty"})), want: TemplateRefused, says: "Identity b"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &adminv1.ExplainPodResponse{Clusters: watched, Pods: []*adminv1.ExplainedPod{tt.pod}}
			if tt.clusters != nil {
				r.Clusters = tt.clusters
			}
			d := &diagnosis{local: &agentv1.ExplainResponse{Status: tt.agent}, status: tt.agent, ca: &CAView{Pods: map[string]*adminv1.ExplainPodResponse{"prod/web-0": r}}, now: asked, noProcess: tt.failed}
			f := d.podFindings(Target{Pod: "prod/web-0"})[0]
			main := f.Main()
			if told := main.Text + "\n" + strings.Join(main.Fix, "\n"); main.Code != tt.want || !strings.Contains(told, tt.says) {
				t.Errorf("got %s %s, want %s with %q", main.Code, told, tt.want, tt.says)
			}
			if f.Pod != tt.pod {
				t.Error("the finding does not say of which pod it is")
			}
		})
	}
}

// TestAProcessAndItsPod: what the agent sees of a process and what the CA makes of its pod, put together.
func TestAProcessAndItsPod(t *testing.T) {
	other := &agentv1.Candidate{EntryId: "signet.pod.prod.shop.2", SpiffeId: "spiffe://example.org/other", Selectors: []string{"k8s:pod-uid:u2"},
		Differences: []*agentv1.Difference{{Selector: "k8s:pod-uid:u2", Kind: "value", Have: []string{"k8s:pod-uid:u1"}}}}
	plain := &agentv1.Candidate{EntryId: "db", SpiffeId: "spiffe://example.org/db", Selectors: []string{"k8s:ns:prod", "unix:uid:7"},
		Differences: []*agentv1.Difference{{Selector: "unix:uid:7", Kind: "value", Have: []string{"unix:uid:1"}}}}
	taken := &agentv1.Candidate{EntryId: "signet.pod.prod.shop.1", SpiffeId: "spiffe://example.org/web", Matches: true, RemovedAt: timestamppb.New(asked)}
	for _, tt := range []struct {
		name       string
		pod        *adminv1.ExplainedPod
		candidates []*agentv1.Candidate
		agent      *agentv1.GetStatusResponse
		ca         error
		want       Code
		says       string
	}{
		{name: "given, and on its way", pod: podOn(nil), want: EntryNotSent, says: "on its way"},
		{name: "given, and the agent hears nothing from its CA", pod: podOn(nil), agent: &agentv1.GetStatusResponse{Id: here.Id, Revision: 7, State: "connecting", Ca: &agentv1.CA{Error: "connection refused", Since: timestamppb.New(asked)}}, want: CAUnreachable},
		{name: "given to the agent of the node as it is now", pod: podOn(func(x *adminv1.ExplainedPod) {
			x.Agents = []*adminv1.NodeAgent{{Id: "spiffe://example.org/spire/agent/k8s_psat/prod/n2", ExpiresAt: here.ExpiresAt}}
		}), want: NodeNotAttested, says: "restart the agent"},
		{name: "other pods' entries come never near", pod: podOn(rules(differing("k8s:sa:x", "value", "k8s:sa:y"))), candidates: []*agentv1.Candidate{other}, want: ServiceAccountDiffers},
		{name: "a template that is nearer than an entry", pod: podOn(rules(differing("k8s:sa:wbe", "typo", "k8s:sa:web"))), candidates: []*agentv1.Candidate{plain}, want: Typo, says: "k8s:sa:wbe"},
		{name: "an entry that is nearer than a template", pod: podOn(rules(&adminv1.PodRule{Rule: "Identity x", Differences: []*adminv1.PodDifference{{Want: "k8s:ns:x", Kind: "value"}, {Want: "k8s:sa:x", Kind: "value"}}})),
			candidates: []*agentv1.Candidate{plain}, want: UserDiffers, says: "db"},
		{name: "taken back, and the CA says why", pod: podOn(rules(&adminv1.PodRule{Rule: "Identity shop", Refused: "its ID is another's"})), candidates: []*agentv1.Candidate{taken}, want: TemplateRefused},
		{name: "taken back, and the CA cannot be asked", candidates: []*agentv1.Candidate{taken}, ca: status.Error(codes.Unavailable, "away"), want: EntryDeleted, says: "NAMESPACE/POD"},
		{name: "no pod of that name in the agent's cluster", pod: podOn(func(x *adminv1.ExplainedPod) { x.Cluster = "test" }), want: NoEntry},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.agent == nil {
				tt.agent = inSync
			}
			v := &CAView{Err: tt.ca, Pods: map[string]*adminv1.ExplainPodResponse{}, Agent: &types.Agent{Selectors: []*types.Selector{{Type: "k8s_psat", Value: "cluster:prod"}}}}
			if tt.pod != nil {
				if tt.pod.Cluster != "prod" {
					tt.pod.Uid = "u9"
				}
				v.Pods["prod/web-0"] = &adminv1.ExplainPodResponse{Clusters: watched, Pods: []*adminv1.ExplainedPod{tt.pod}, Templates: 1}
			}
			p := &agentv1.Process{Pid: 7, Uid: 1, Methods: ofThePod, Candidates: tt.candidates}
			d := &diagnosis{local: &agentv1.ExplainResponse{Status: tt.agent, Processes: []*agentv1.Process{p}}, status: tt.agent, ca: v, now: asked}
			f := d.process(p)
			main := f.Main()
			if told := main.Text + "\n" + strings.Join(main.Fix, "\n"); main.Code != tt.want || !strings.Contains(told, tt.says) {
				t.Errorf("got %s %s, want %s with %q", main.Code, told, tt.want, tt.says)
			}
			for _, c := range f.Causes {
				if strings.Contains(c.Text, "spiffe://example.org/other") {
					t.Errorf("another pod's entry: %s", c.Text)
				}
			}
		})
	}
}
