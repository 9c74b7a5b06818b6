package why

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/internal/nearmiss"
)

// What the CA makes of pods: templated Identities and ClusterSPIFFEIDs give them entries that only it works out. The command
// line asks it, as an admin; the agent never does, so that a node that was stolen learns nothing of other nodes' pods.

const (
	// maxPods bounds the pods that the CA is asked about.
	maxPods = 20
	// maxRefusals bounds the causes of one kind about a pod.
	maxRefusals = 5
	// far is farther than any rule is from a pod.
	far = 1 << 20
	// podEntryPrefix starts the ids of entries that stand for pods.
	podEntryPrefix = "signet.pod."
)

// States of a pod, as signet.admin.v1 has them.
const (
	stateKnown       = "known"
	stateAbsent      = "absent"
	stateUnscheduled = "unscheduled"
	stateEnded       = "ended"
	stateUnseen      = "unseen"
	stateLeftOut     = "left_out"
)

// A podName is a pod as a process has it.
type podName struct{ namespace, name, uid string }

func (n podName) String() string { return n.namespace + "/" + n.name }

// podOf is the pod of a process, as the agent found out.
func podOf(p *agentv1.Process) (n podName, ok bool) {
	for _, m := range p.GetMethods() {
		for _, s := range m.GetSelectors() {
			for prefix, into := range map[string]*string{"k8s:ns:": &n.namespace, "k8s:pod-name:": &n.name, "k8s:pod-uid:": &n.uid} {
				if v, is := strings.CutPrefix(s, prefix); is {
					*into = v
				}
			}
		}
	}
	return n, n.namespace != "" && n.name != ""
}

// otherPods tells whether an entry is one that a template gave another pod than the process's, as far as that is known.
func (d *diagnosis) otherPods(p *agentv1.Process, c *agentv1.Candidate) bool {
	return strings.HasPrefix(c.GetEntryId(), podEntryPrefix) && methodError(p, "k8s") == "" && d.unavailable("k8s") == "" &&
		slices.ContainsFunc(c.GetDifferences(), func(x *agentv1.Difference) bool { return strings.HasPrefix(x.GetSelector(), "k8s:pod-uid:") })
}

// askPods asks the CA about the target's pod, or about those of its processes. A CA that knows no such question is not asked.
func (v *CAView) askPods(ctx context.Context, conn grpc.ClientConnInterface, local *agentv1.ExplainResponse, t Target) error {
	client := adminv1.NewPodsClient(conn)
	v.Pods = map[string]*adminv1.ExplainPodResponse{}
	ask := func(n podName) error {
		if v.Pods[n.String()] != nil || len(v.Pods) >= maxPods {
			return nil
		}
		r, err := client.ExplainPod(ctx, &adminv1.ExplainPodRequest{Cluster: t.Cluster, Namespace: n.namespace, Name: n.name})
		switch status.Code(err) {
		case codes.OK:
			v.Pods[n.String()] = r
		case codes.Unimplemented:
		default:
			return fmt.Errorf("asking for pod %s: %w", n, err)
		}
		return nil
	}
	if namespace, name, ok := strings.Cut(t.Pod, "/"); ok {
		if err := ask(podName{namespace, name, ""}); err != nil {
			return err
		}
	}
	if t.ID != "" {
		return nil
	}
	for _, p := range local.GetProcesses() {
		if n, ok := podOf(p); ok {
			if err := ask(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// cluster is the one in which the agent's node is, if its attestation has shown it.
func (d *diagnosis) cluster() string {
	for _, s := range d.ca.Agent.GetSelectors() {
		if c, ok := strings.CutPrefix(s.GetValue(), "cluster:"); ok && s.GetType() == "k8s_psat" {
			return c
		}
	}
	return ""
}

// pod is what the CA makes of a process's pod: nil if it was not asked or has nothing to say. cause is set where the pod cannot be
// told among those of the clusters.
func (d *diagnosis) pod(p *agentv1.Process) (x *adminv1.ExplainedPod, trouble *Cause) {
	n, ok := podOf(p)
	r := d.ca.Pods[n.String()]
	if !ok || r == nil || len(r.GetClusters()) == 0 && r.GetTemplates() == 0 {
		return nil, nil
	}
	cluster := d.cluster()
	watched := slices.ContainsFunc(r.GetClusters(), func(c *adminv1.WatchedCluster) bool { return c.GetName() == cluster })
	var named *adminv1.ExplainedPod
	for _, x := range r.GetPods() {
		switch {
		case n.uid != "" && x.GetUid() == n.uid && (cluster == "" || x.GetCluster() == cluster):
			return x, nil
		case cluster == x.GetCluster():
			named = x
		}
	}
	switch {
	case cluster == "":
		return nil, cause(NodeNotAttested, "templated Identities are for pods of nodes that the CA knows, and this node's agent, %s, has attested by %s: the CA cannot tell of which cluster the node is",
			d.status.GetId(), orUnknownAttestor(d.status)).fix("# in the agent's configuration: node_attestation: {k8s_psat: {cluster: NAME}}")
	case !watched:
		return nil, d.notWatched(r, cluster)
	case named == nil:
		return nil, nil
	case n.uid != "" && named.GetUid() != "" && named.GetUid() != n.uid:
		return named, cause(PodReplaced, "process %d is of the pod %s with the UID %s, and what the API server of cluster %s has under that name is another pod, %s: this process is being ended",
			p.GetPid(), n, n.uid, cluster, named.GetUid())
	}
	return named, nil
}

func orUnknownAttestor(s *agentv1.GetStatusResponse) string {
	if s.GetAttestor() == "" {
		return "another way than k8s_psat"
	}
	return s.GetAttestor()
}

func (d *diagnosis) notWatched(r *adminv1.ExplainPodResponse, cluster string) *Cause {
	var names []string
	for _, c := range r.GetClusters() {
		names = append(names, c.GetName())
	}
	what := "this CA does not watch the pods of cluster " + cluster
	switch {
	case cluster == "" && len(names) == 0:
		what, cluster = "this CA watches the pods of no cluster", "NAME"
	case len(names) == 0:
		what += ", nor those of any other"
	default:
		what += ", but those of " + strings.Join(names, ", ")
	}
	return cause(ClusterNotWatched, "%s: templated Identities give its pods nothing", what).
		fix("# in the CA's configuration: kubernetes: {clusters: {%s: {pods: {}}}}; the name is that under node_attestors.k8s_psat.clusters", cluster)
}

// A podDiagnosis is what is wrong with what the CA gives a pod.
type podDiagnosis struct {
	// concerned are causes that keep from the pod what rules are there to give it; near says what comes nearest where there is
	// no such rule.
	concerned []*Cause
	near      *Cause
	nearCost  int
	// given are the rules that give it something which its node is sent.
	given []*adminv1.PodRule
}

// explainPod names the causes about a pod.
func (d *diagnosis) explainPod(r *adminv1.ExplainPodResponse, x *adminv1.ExplainedPod) podDiagnosis {
	var out podDiagnosis
	add := func(c *Cause) { out.concerned = append(out.concerned, c) }
	what := fmt.Sprintf("pod %s/%s of cluster %s", x.GetNamespace(), x.GetName(), x.GetCluster())
	for _, c := range r.GetClusters() {
		if c.GetName() == x.GetCluster() && !c.GetSynced() {
			add(cause(ClusterNotSynced, "the CA does not know the pods of cluster %s now: %s", c.GetName(), strings.TrimPrefix(c.GetProblem(), "cluster "+c.GetName()+": ")).
				fix("# does its API server answer the CA, and may it list and watch pods, nodes and namespaces? signet doctor"))
		}
	}
	if c := d.podState(x, what); c != nil {
		add(c)
		return out
	}
	if c := unplaced(x, what); c != nil {
		add(c)
		return out
	}
	var expired, elsewhere, refused, near []*adminv1.PodRule
	for _, rule := range x.GetRules() {
		switch {
		case rule.GetRefused() != "":
			refused = append(refused, rule)
		case rule.GetExpired():
			expired = append(expired, rule)
		case rule.GetEntryId() == "":
			near = append(near, rule)
		case len(rule.GetMissingOn()) > 0:
			elsewhere = append(elsewhere, rule)
		default:
			out.given = append(out.given, rule)
		}
	}
	if len(out.given)+len(elsewhere) > 0 {
		if c := d.nodeAgent(x, what); c != nil {
			add(c)
		}
	}
	for _, rule := range refused[:min(len(refused), maxRefusals)] {
		add(cause(TemplateRefused, "%s is for %s, and gives it nothing: %s", rule.GetRule(), what, rule.GetRefused()).fix("%s", showRule(rule)).
			fix("# the same is an Event on the pod: kubectl -n %s describe pod %s", quote(x.GetNamespace()), quote(x.GetName())))
	}
	for _, rule := range expired[:min(len(expired), maxRefusals)] {
		add(cause(EntryExpired, "%s is for %s, and its expiresAt is past: it stands for no pods any more", rule.GetRule(), what).fix("%s", showRule(rule)))
	}
	for _, rule := range elsewhere[:min(len(elsewhere), maxRefusals)] {
		add(cause(EntryOtherNode, "%s gives %s to %s, and what it says under `on` does not hold for the pod's node %s: its agent, %s, does not have %s", rule.GetRule(), rule.GetSpiffeId(), what,
			x.GetNodeName(), agentIDs(x), strings.Join(rule.GetMissingOn(), ", ")).fix("signet agent show %s", quote(x.GetAgents()[0].GetId())).fix("%s", showRule(rule)))
	}
	if len(out.given)+len(expired)+len(elsewhere)+len(refused) == 0 {
		out.near, out.nearCost = d.nearestRule(r, x, what, near)
	}
	return out
}

// podState says why a pod is not known.
func (d *diagnosis) podState(x *adminv1.ExplainedPod, what string) *Cause {
	switch x.GetState() {
	case stateKnown:
		return nil
	case stateAbsent:
		return cause(PodUnknown, "there is no %s: the API server has none of that name", what).fix("kubectl -n %s get pods", quote(x.GetNamespace()))
	case stateUnscheduled:
		c := cause(PodNotScheduled, "%s is on no node yet, and an identity belongs to the node that runs the pod", what)
		if x.GetDetail() != "" {
			c.Text += ": " + x.GetDetail()
		}
		return c.fix("kubectl -n %s describe pod %s", quote(x.GetNamespace()), quote(x.GetName()))
	case stateEnded:
		return cause(PodEnded, "%s has ended (%s): it has no identity any more", what, x.GetDetail())
	case stateUnseen:
		return cause(PodNotSeen, "%s is on node %s, and the CA has not seen it yet: its watch of the cluster is behind", what, x.GetNodeName()).
			fix("# ask again in a few seconds; if it stays so: signet doctor, and the CA's log")
	case stateLeftOut:
		return cause(PodLeftOut, "%s is larger than a pod may be for the CA, or the cluster has more than it keeps: it gets no identity", what).
			fix("# signet_ca_kubernetes_left_out_objects counts them; are labels and annotations of the pod very large?")
	}
	return cause(PodUnknown, "the CA does not know %s, and could not ask whether there is one: %s", what, x.GetDetail())
}

// unplaced says why a pod that is known gets nothing, whatever rules say.
func unplaced(x *adminv1.ExplainedPod, what string) *Cause {
	switch {
	case x.GetMirror():
		return cause(PodStatic, "%s is a static pod: its kubelet made it by itself, nobody asked the API server for it, and it gets no identity of templates", what).
			fix("# make a Deployment or DaemonSet of it, or register an entry: signet entry create")
	case x.GetNodeUid() != "":
		return nil
	case x.GetUnplaced() == "former_node":
		return cause(NodeFormer, "%s was put on a former node named %s, and the node of that name is another one now: it gets nothing that was meant for the former", what, x.GetNodeName()).
			fix("# so that it is made and scheduled anew: kubectl -n %s delete pod %s", quote(x.GetNamespace()), quote(x.GetName()))
	case x.GetUnplaced() == "namespace_unknown":
		return cause(PodNotSeen, "the CA has not seen the namespace of %s yet, and may not take it for one without labels", what).
			fix("# ask again in a few seconds; if it stays so: may the CA list and watch namespaces? signet doctor")
	}
	return cause(NodeUnknown, "%s is on node %s, and the CA knows no node of that name in the cluster", what, x.GetNodeName()).
		fix("# is it there, and may the CA list and watch nodes? kubectl get node %s", quote(x.GetNodeName()))
}

// nodeAgent says why no agent is sent what the pod stands for.
func (d *diagnosis) nodeAgent(x *adminv1.ExplainedPod, what string) *Cause {
	if len(x.GetAgents()) == 0 {
		c := cause(NodeNotAttested, "%s is on node %s (UID %s), and no agent has attested by k8s_psat as that node: nobody is sent what the pod is given", what, x.GetNodeName(), x.GetNodeUid())
		return c.fix("# does the agent of the DaemonSet run there? kubectl get pods -A --field-selector spec.nodeName=%s", quote(x.GetNodeName())).
			fix("# does it attest by k8s_psat, under the cluster name %s? signet agent list", x.GetCluster())
	}
	var banned, expired *adminv1.NodeAgent
	for _, a := range x.GetAgents() {
		switch {
		case a.GetBanned():
			banned = a
		case a.GetExpiresAt() != nil && !d.now.Before(a.GetExpiresAt().AsTime()):
			expired = a
		default:
			return nil
		}
	}
	if banned != nil {
		return cause(AgentBanned, "%s is on node %s, and an operator has banned its agent %s: the CA issues nothing to it", what, x.GetNodeName(), banned.GetId()).fix("signet agent unban %s", quote(banned.GetId()))
	}
	return cause(AgentSVIDExpired, "%s is on node %s, and the SVID of its agent %s ended at %s: it has not attested since", what, x.GetNodeName(), expired.GetId(), clock(expired.GetExpiresAt())).
		fix("# does the agent of the DaemonSet run there? kubectl get pods -A --field-selector spec.nodeName=%s", quote(x.GetNodeName()))
}

func agentIDs(x *adminv1.ExplainedPod) string {
	var ids []string
	for _, a := range x.GetAgents() {
		ids = append(ids, a.GetId())
	}
	return strings.Join(ids, ", ")
}

// showRule is the command that shows a rule.
func showRule(rule *adminv1.PodRule) string {
	kind, name, _ := strings.Cut(rule.GetRule(), " ")
	if kind == "Identity" {
		return fmt.Sprintf("signet get identity %s -o yaml", quote(name))
	}
	return fmt.Sprintf("kubectl get %s %s -o yaml", quote(strings.ToLower(kind)), quote(name))
}

// nearestRule names what keeps the nearest rule from concerning the pod.
func (d *diagnosis) nearestRule(r *adminv1.ExplainPodResponse, x *adminv1.ExplainedPod, what string, near []*adminv1.PodRule) (*Cause, int) {
	if len(near) == 0 {
		if r.GetTemplates() == 0 {
			return nil, 0
		}
		return cause(NoTemplate, "none of %d templated Identities is for %s", r.GetTemplates(), what).fix("signet get identities"), far
	}
	rule := near[0]
	main, cost, likely := rule.GetDifferences()[0], 0, len(rule.GetDifferences()) == 1
	for _, x := range rule.GetDifferences() {
		kind := nearmiss.Kind(x.GetKind())
		cost += kind.Cost()
		likely = likely || kind.Near()
		if kind.Cost() > nearmiss.Kind(main.GetKind()).Cost() {
			main = x
		}
	}
	code, text := podDifference(main)
	c := cause(code, "no template is for %s; the nearest is %s: %s", what, rule.GetRule(), text)
	if !likely {
		c.Code = NoTemplate
	}
	for _, x := range rule.GetDifferences() {
		if x != main {
			_, more := podDifference(x)
			c.Text += "; and " + more
		}
	}
	return c.fix("%s", showRule(rule)).fix("# then correct its selectors, or the pod's: kubectl -n %s get pod %s -o yaml", quote(x.GetNamespace()), quote(x.GetName())), cost
}

// podDifference says what is wrong with one thing that a rule asks of a pod.
func podDifference(x *adminv1.PodDifference) (Code, string) {
	want, have := x.GetWant(), strings.Join(x.GetHave(), ", ")
	field := fieldCode(want)
	switch nearmiss.Kind(x.GetKind()) {
	case nearmiss.Contradiction:
		return SelectorsTwoOfOne, fmt.Sprintf("it wants %s and another value of the same, and no pod has both", want)
	case nearmiss.Case:
		return WrongCase, fmt.Sprintf("it wants %s, and the pod has %s: upper and lower case count", want, have)
	case nearmiss.Space:
		return StraySpace, fmt.Sprintf("it wants %q, and the pod has %q: white space counts", want, have)
	case nearmiss.Typo:
		return Typo, fmt.Sprintf("it wants %s, and the pod has %s: a typing error?", want, have)
	}
	if have == "" {
		switch field {
		case LabelDiffers:
			return LabelMissing, fmt.Sprintf("it wants %s, and there is no such label", want)
		case SelectorDiffers:
			field = SelectorMissing
		}
		return field, fmt.Sprintf("it wants %s, and the pod has nothing of the kind", want)
	}
	return field, fmt.Sprintf("it wants %s, and the pod has %s", want, have)
}

// fieldCode is what kind of cause it is that a selector of a pod differs.
func fieldCode(want string) Code {
	for prefix, code := range map[string]Code{"k8s:ns:": NamespaceDiffers, "a namespace": NamespaceDiffers, "k8s:sa:": ServiceAccountDiffers, "k8s:pod-owner:": OwnerDiffers, "k8s_psat:cluster:": ClusterDiffers,
		"k8s:pod-label:": LabelDiffers, "k8s:ns-label:": LabelDiffers, "podSelector:": LabelDiffers, "namespaceSelector:": LabelDiffers} {
		if strings.HasPrefix(want, prefix) {
			return code
		}
	}
	return SelectorDiffers
}

// podFindings are those of a pod of which no process is here: for each cluster that has one of the name, or else one.
func (d *diagnosis) podFindings(t Target) []Finding {
	r := d.ca.Pods[t.Pod]
	if r == nil {
		return nil
	}
	if len(r.GetPods()) == 0 {
		if d.noProcess != nil && len(r.GetClusters()) == 0 && r.GetTemplates() == 0 {
			return nil // nobody means to use templates: what the agent said is all
		}
		f := Finding{}
		f.add(d.notWatched(r, t.Cluster))
		f.add(d.notHere())
		return []Finding{f}
	}
	there := slices.DeleteFunc(slices.Clone(r.GetPods()), func(x *adminv1.ExplainedPod) bool { return x.GetState() == stateAbsent })
	if len(there) == 0 {
		there = r.GetPods()[:1]
	}
	var out []Finding
	for _, x := range there {
		out = append(out, d.podFinding(r, x))
	}
	return out
}

func (d *diagnosis) podFinding(r *adminv1.ExplainPodResponse, x *adminv1.ExplainedPod) Finding {
	f := Finding{Pod: x}
	p := d.explainPod(r, x)
	for _, c := range p.concerned {
		f.add(c)
	}
	f.add(p.near)
	if x.GetState() != stateKnown {
		return f
	}
	here := d.status != nil && slices.ContainsFunc(x.GetAgents(), func(a *adminv1.NodeAgent) bool { return a.GetId() == d.status.GetId() })
	switch {
	case here:
		f.add(d.notHere())
	case d.status != nil && !here && len(x.GetAgents()) > 0:
		f.add(cause(PodOtherNode, "the pod runs on node %s, whose agent is %s; the one that was asked here is %s, which serves only pods of its own node", x.GetNodeName(), agentIDs(x), orUnknownAgent(d.status)).
			fix("# on that node: signet why %s/%s", quote(x.GetNamespace()), quote(x.GetName())))
	}
	if len(f.Causes) == 0 && len(p.given) == 0 {
		f.add(cause(NoEntry, "no rule of this CA is for pods of cluster %s", x.GetCluster()).fix("# docs/kubernetes/identities.md; a template for all: spiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}"))
	}
	if len(f.Causes) > 0 {
		return f
	}
	var gives []string
	bound := false
	for _, rule := range p.given {
		one := rule.GetSpiffeId() + " by " + rule.GetRule()
		if s := rule.GetProcessSelectors(); len(s) > 0 {
			one += " (for its processes with " + strings.Join(s, ", ") + ")"
			bound = true
		}
		gives = append(gives, one)
	}
	c := cause(Served, "the CA gives pod %s/%s to the agent of its node %s, %s: %s", x.GetNamespace(), x.GetName(), x.GetNodeName(), agentIDs(x), strings.Join(gives, ", "))
	if bound {
		c.Text += "; whether one of its processes is so, only the agent can say"
		c.fix("# on that node: signet why %s/%s", quote(x.GetNamespace()), quote(x.GetName()))
	}
	f.add(c)
	return f
}

// notHere is what the agent said when it found no process of a pod; nil: it was not asked.
func (d *diagnosis) notHere() *Cause {
	switch status.Code(d.noProcess) {
	case codes.OK:
		return nil
	case codes.FailedPrecondition:
		return cause(TypeNotAttested, "the agent cannot tell the pod's processes: %s", status.Convert(d.noProcess).Message())
	}
	return cause(ProcessGone, "the agent found none of the pod's processes: %s", status.Convert(d.noProcess).Message())
}

func orUnknownAgent(s *agentv1.GetStatusResponse) string {
	if s.GetId() == "" {
		return "one that has not attested yet"
	}
	return s.GetId()
}

// aboutPod adds what the CA says of a process's pod, of which no entry matches. It returns what to say if nothing else comes nearer, and how far that is.
func (d *diagnosis) aboutPod(f *Finding, p *agentv1.Process) (near *Cause, cost int) {
	x, trouble := d.pod(p)
	f.Pod = x
	if x != nil && trouble != nil {
		f.add(trouble)
		return nil, 0
	}
	if x == nil {
		return trouble, far
	}
	n, _ := podOf(p)
	e := d.explainPod(d.ca.Pods[n.String()], x)
	for _, c := range e.concerned {
		if c.Code == NodeNotAttested || c.Code == AgentSVIDExpired {
			c.Text += fmt.Sprintf("; the agent that was asked here is %s, attested by %s", orUnknownAgent(d.status), orUnknownAttestor(d.status))
		}
		f.add(c)
	}
	if len(e.concerned) > 0 || len(e.given) == 0 {
		return e.near, e.nearCost
	}
	held := func(rule *adminv1.PodRule) bool {
		return slices.ContainsFunc(p.GetCandidates(), func(c *agentv1.Candidate) bool { return c.GetEntryId() == rule.GetEntryId() && c.GetRemovedAt() == nil })
	}
	here := slices.ContainsFunc(x.GetAgents(), func(a *adminv1.NodeAgent) bool { return a.GetId() == d.status.GetId() })
	switch {
	case slices.ContainsFunc(e.given, held): // what it wants of the process does not hold: that is said of the entry
	case !here:
		f.add(cause(NodeNotAttested, "the CA gives %s by %s to the agent of node %s, %s, and the agent here is another one, %s", e.given[0].GetSpiffeId(), e.given[0].GetRule(), x.GetNodeName(), agentIDs(x), orUnknownAgent(d.status)).
			fix("# was the node made anew? restart the agent, so that it attests as the node that it is now"))
	default:
		if c := d.agent(); c != nil {
			f.add(c)
		}
		f.add(cause(EntryNotSent, "the CA gives %s by %s to this agent, which has not got it yet: it is on its way", e.given[0].GetSpiffeId(), e.given[0].GetRule()).
			fix("# ask again; if it stays so: signet agent status, and the agent's log"))
	}
	return nil, 0
}
