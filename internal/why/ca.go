package why

import (
	"context"
	"fmt"
	"slices"
	"strings"

	agentapi "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	"github.com/signet-id/signet/internal/nearmiss"
	"github.com/signet-id/signet/spiffe"
)

const (
	// maxAsked bounds the selectors that the CA is asked with, and maxListed the entries that it is asked for.
	maxAsked  = 100
	maxListed = 500
)

// A CAView is what the CA knows that the agent does not: entries of other nodes above all.
type CAView struct {
	// Err is why the CA could not be asked; nil if it was.
	Err error
	// Entries are those that the process's selectors satisfy, or that the ID names.
	Entries []*types.Entry
	// Near are entries of other nodes that share a selector with the process.
	Near []*types.Entry
	// Aliases are the groups of nodes that are parents of entries.
	Aliases []*types.Entry
	// Agent is this node's agent as the CA knows it; nil: it does not.
	Agent *types.Agent
	// Pods is what the CA makes of pods, by namespace/name.
	Pods map[string]*adminv1.ExplainPodResponse
	// PodsErr is why it did not say so of all.
	PodsErr error

	known map[string]bool // parents: agents that are there
}

// entry returns the entry with that id, if the CA has it.
func (v *CAView) entry(id string) *types.Entry {
	for _, e := range v.Entries {
		if e.GetId() == id {
			return e
		}
	}
	return nil
}

// askCA asks for what concerns the target.
func askCA(ctx context.Context, conn grpc.ClientConnInterface, local *agentv1.ExplainResponse, t Target) *CAView {
	v := &CAView{known: map[string]bool{}}
	if v.Err = v.ask(ctx, entryv1.NewEntryClient(conn), agentapi.NewAgentClient(conn), local, t); v.Err == nil {
		v.PodsErr = v.askPods(ctx, conn, local, t)
	}
	return v
}

func (v *CAView) ask(ctx context.Context, entries entryv1.EntryClient, agents agentapi.AgentClient, local *agentv1.ExplainResponse, t Target) error {
	if id := local.GetStatus().GetId(); id != "" {
		a, err := agents.GetAgent(ctx, &agentapi.GetAgentRequest{Id: wireID(id)})
		if err == nil {
			v.Agent = a
		} else if status.Code(err) != codes.NotFound {
			return fmt.Errorf("asking for agent %s: %w", id, err)
		}
	}
	if t.ID != "" {
		if err := v.byID(ctx, entries, local, t.ID); err != nil {
			return err
		}
	}
	for _, p := range local.GetProcesses() {
		selectors := wireSelectors(p)
		if len(selectors) == 0 || t.ID != "" {
			continue
		}
		for _, kind := range []types.SelectorMatch_MatchBehavior{types.SelectorMatch_MATCH_SUBSET, types.SelectorMatch_MATCH_ANY} {
			list, err := entries.ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: maxListed, Filter: &entryv1.ListEntriesRequest_Filter{
				BySelectors: &types.SelectorMatch{Selectors: selectors, Match: kind}}})
			if err != nil {
				return fmt.Errorf("asking for entries: %w", err)
			}
			if kind == types.SelectorMatch_MATCH_SUBSET {
				v.Entries = append(v.Entries, list.GetEntries()...)
			} else {
				v.Near = append(v.Near, list.GetEntries()...)
			}
		}
		for _, c := range p.GetCandidates() { // does the CA still have what the agent had to give up?
			if c.GetRemovedAt() == nil || v.entry(c.GetEntryId()) != nil {
				continue
			}
			if e, err := entries.GetEntry(ctx, &entryv1.GetEntryRequest{Id: c.GetEntryId()}); err == nil {
				v.Entries = append(v.Entries, e)
			}
		}
	}
	return v.parents(ctx, entries, agents)
}

// byID finds the entries of an id or a SPIFFE ID.
func (v *CAView) byID(ctx context.Context, entries entryv1.EntryClient, local *agentv1.ExplainResponse, id string) error {
	if strings.HasPrefix(id, "/") {
		id = "spiffe://" + local.GetStatus().GetTrustDomain() + id
	}
	if !strings.HasPrefix(id, "spiffe://") {
		e, err := entries.GetEntry(ctx, &entryv1.GetEntryRequest{Id: id})
		if err == nil {
			v.Entries = append(v.Entries, e)
		} else if c := status.Code(err); c != codes.NotFound && c != codes.InvalidArgument {
			return fmt.Errorf("asking for entry %q: %w", id, err)
		}
		return nil
	}
	if td, _, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/"); td != local.GetStatus().GetTrustDomain() {
		return nil
	}
	list, err := entries.ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: maxListed, Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: wireID(id)}})
	if err != nil {
		return fmt.Errorf("asking for entries of %q: %w", id, err)
	}
	v.Entries = append(v.Entries, list.GetEntries()...)
	return nil
}

// parents finds out what the parents of the entries are: agents, groups of nodes, or nothing.
func (v *CAView) parents(ctx context.Context, entries entryv1.EntryClient, agents agentapi.AgentClient) error {
	seen := map[string]bool{}
	for _, e := range v.Entries {
		parent := textID(e.GetParentId())
		if seen[parent] || len(seen) >= maxAsked {
			continue
		}
		seen[parent] = true
		if isAgent(e.GetParentId()) {
			_, err := agents.GetAgent(ctx, &agentapi.GetAgentRequest{Id: e.GetParentId()})
			if c := status.Code(err); c != codes.OK && c != codes.NotFound {
				return fmt.Errorf("asking for agent %s: %w", parent, err)
			}
			v.known[parent] = err == nil
			continue
		}
		list, err := entries.ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: maxListed, Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: e.GetParentId()}})
		if err != nil {
			return fmt.Errorf("asking for entries of %q: %w", parent, err)
		}
		v.Aliases = append(v.Aliases, list.GetEntries()...)
	}
	return nil
}

func wireID(id string) *types.SPIFFEID {
	td, path, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
	return &types.SPIFFEID{TrustDomain: td, Path: "/" + path}
}

func textID(id *types.SPIFFEID) string { return "spiffe://" + id.GetTrustDomain() + id.GetPath() }

func isAgent(id *types.SPIFFEID) bool { return strings.HasPrefix(id.GetPath(), "/spire/agent/") }

func wireSelectors(p *agentv1.Process) []*types.Selector {
	var out []*types.Selector
	for _, m := range p.GetMethods() {
		for _, s := range m.GetSelectors() {
			typ, value, ok := strings.Cut(s, ":")
			if ok && len(out) < maxAsked {
				out = append(out, &types.Selector{Type: typ, Value: value})
			}
		}
	}
	return out
}

func selectorsOf(e *types.Entry) []string {
	var out []string
	for _, s := range e.GetSelectors() {
		out = append(out, s.GetType()+":"+s.GetValue())
	}
	return out
}

// An elsewhere is an entry that the CA has and the agent does not.
type elsewhere struct {
	entryID string
	here    bool // it is for this very node
	cause   *Cause
}

// elsewhere finds an entry that the process would match if it were for this node, or is nil.
func (d *diagnosis) elsewhere(p *agentv1.Process) *elsewhere {
	if d.ca.Err != nil {
		return nil
	}
	mine := d.status.GetId()
	var best *elsewhere
	for _, e := range d.ca.Entries {
		if slices.ContainsFunc(p.GetCandidates(), func(c *agentv1.Candidate) bool { return c.GetEntryId() == e.GetId() && c.GetRemovedAt() == nil }) {
			continue
		}
		parent := textID(e.GetParentId())
		if parent == mine || d.inGroup(parent) {
			return &elsewhere{entryID: e.GetId(), here: true}
		}
		if best == nil {
			best = &elsewhere{entryID: e.GetId(), cause: d.parent(e, parent)}
		}
	}
	if best == nil {
		return d.nearElsewhere(p)
	}
	return best
}

// inGroup says whether this agent is one of a group of nodes.
func (d *diagnosis) inGroup(group string) bool {
	for _, a := range d.ca.Aliases {
		if textID(a.GetSpiffeId()) == group && len(d.missingNodeSelectors(a)) == 0 {
			return true
		}
	}
	return false
}

// missingNodeSelectors are those of a group that this node does not have.
func (d *diagnosis) missingNodeSelectors(group *types.Entry) []string {
	if d.ca.Agent == nil {
		return selectorsOf(group)
	}
	var missing []string
	have := map[string]bool{}
	for _, s := range d.ca.Agent.GetSelectors() {
		have[s.GetType()+":"+s.GetValue()] = true
	}
	for _, s := range selectorsOf(group) {
		if !have[s] {
			missing = append(missing, s)
		}
	}
	return missing
}

// parent says what is wrong with an entry's parent.
func (d *diagnosis) parent(e *types.Entry, parent string) *Cause {
	mine := d.status.GetId()
	what := fmt.Sprintf("entry %s for %s matches the process, and its parent is %s", e.GetId(), textID(e.GetSpiffeId()), parent)
	var c *Cause
	switch {
	case isAgent(e.GetParentId()) && d.ca.known[parent]:
		c = cause(EntryOtherNode, "%s: another node; this one is %s", what, mine)
	case isAgent(e.GetParentId()):
		c = cause(WrongParent, "%s: an agent that the CA does not know (a token that was used by nobody, or an agent that was evicted); this one is %s", what, mine)
	default:
		groups := 0
		for _, a := range d.ca.Aliases {
			if textID(a.GetSpiffeId()) == parent && a.GetParentId().GetPath() == "/spire/server" {
				groups++
				if missing := d.missingNodeSelectors(a); len(missing) > 0 && c == nil {
					c = cause(EntryOtherNode, "%s: a group of nodes with %s, which this node, %s, does not have", what, strings.Join(missing, ", "), mine)
				}
			}
		}
		if groups == 0 {
			c = cause(WrongParent, "%s: neither an agent nor a group of nodes, so that no node serves it; this node is %s", what, mine)
		}
		if strings.HasPrefix(e.GetParentId().GetPath(), "/spire/signet/nodes/") {
			c = cause(EntryOtherNode, "entry %s for %s matches the process, and what its Identity says under `on` does not hold for this node, %s", e.GetId(), textID(e.GetSpiffeId()), mine)
			return c.fix("signet agent show %s", quote(mine))
		}
	}
	return c.fix("# for this node, too:").fix("%s", d.createEntry(textID(e.GetSpiffeId()), selectorsOf(e))).
		fix("# or for this node instead: signet entry update %s --parent-id %s", quote(e.GetId()), quote(mine))
}

// nearElsewhere finds an entry of another node that comes near the process, where none does exactly.
func (d *diagnosis) nearElsewhere(p *agentv1.Process) *elsewhere {
	var have []spiffe.Selector
	var types []string
	for _, m := range p.GetMethods() {
		types = append(types, m.GetName())
		for _, s := range m.GetSelectors() {
			if sel, err := spiffe.ParseSelector(s); err == nil {
				have = append(have, sel)
			}
		}
	}
	for _, c := range p.GetCandidates() { // what this node has comes first
		if !c.GetMatches() && len(c.GetDifferences()) < len(c.GetSelectors()) {
			return nil
		}
	}
	subject := nearmiss.NewSubject(have, types, nearmiss.Host{})
	for _, e := range d.ca.Near {
		parent := textID(e.GetParentId())
		if parent == d.status.GetId() || slices.ContainsFunc(p.GetCandidates(), func(c *agentv1.Candidate) bool { return c.GetEntryId() == e.GetId() }) {
			continue
		}
		var want []spiffe.Selector
		for _, s := range selectorsOf(e) {
			if sel, err := spiffe.ParseSelector(s); err == nil {
				want = append(want, sel)
			}
		}
		r := subject.Compare(want)
		if len(r.Differences) == 1 && r.Differences[0].Kind.Near() && len(r.Differences[0].Have) > 0 {
			x := r.Differences[0]
			return &elsewhere{entryID: e.GetId(), cause: cause(EntryOtherNode,
				"no entry of this node comes near; entry %s for %s would, but its parent is %s, and it wants %s where the process has %s",
				e.GetId(), textID(e.GetSpiffeId()), parent, x.Want, x.Have[0])}
		}
	}
	return nil
}

// id names the causes for an entry's id or a SPIFFE ID.
func (d *diagnosis) id(id string) Finding {
	f := Finding{}
	if strings.HasPrefix(id, "/") {
		id = "spiffe://" + d.status.GetTrustDomain() + id
	}
	if rest, ok := strings.CutPrefix(id, "spiffe://"); ok {
		if td, _, _ := strings.Cut(rest, "/"); td != d.status.GetTrustDomain() {
			f.add(cause(OtherTrustDomain, "%s is of trust domain %s, and this agent of %s: its CA issues nothing of another trust domain; to verify its SVIDs, an entry must federate with %s", id, td, d.status.GetTrustDomain(), td).
				fix("# on the CA, for the bundle: signet federation create, or signet bundle set %s FILE", quote(td)).
				fix("# then, for each service that talks to it: signet entry update ENTRY-ID --federates-with %s", quote(td)))
			return f
		}
	}
	if d.status.GetRevision() == 0 {
		f.add(d.neverSynced())
		return f
	}
	for _, c := range d.local.GetEntries() {
		switch {
		case c.GetRemovedAt() != nil && d.ca.entry(c.GetEntryId()) != nil:
			f.add(d.parent(d.ca.entry(c.GetEntryId()), textID(d.ca.entry(c.GetEntryId()).GetParentId())))
		case c.GetExpired():
			f.add(d.expired(c))
		case c.GetRemovedAt() != nil:
			f.add(d.deleted(c))
		default:
			d.entry(&f, c)
		}
	}
	for _, e := range d.ca.Entries {
		parent := textID(e.GetParentId())
		if slices.ContainsFunc(d.local.GetEntries(), func(c *agentv1.Candidate) bool { return c.GetEntryId() == e.GetId() }) {
			continue
		}
		switch {
		case parent == d.status.GetId() || d.inGroup(parent):
			if c := d.agent(); c != nil {
				f.add(c)
				continue
			}
			f.add(cause(EntryExpired, "entry %s for %s is for this node, and the agent was not sent it: it has ended, or is on its way", e.GetId(), textID(e.GetSpiffeId())))
		default:
			c := d.parent(e, parent)
			c.Text = strings.Replace(c.Text, "matches the process, and its parent is", "has the parent", 1)
			f.add(c)
		}
	}
	if len(f.Causes) == 0 {
		c := cause(UnknownID, "this node has no entry %s", id)
		if d.ca.Err != nil {
			c.Text += "; whether other nodes have one only the CA knows, which could not be asked"
			c.fix("# on the CA: signet entry list --spiffe-id %s", quote(id))
		} else {
			c.Text += ", nor does the CA have one"
			c.fix("signet entry list")
		}
		f.add(c)
	}
	return f
}

// entry says how an entry that is held does.
func (d *diagnosis) entry(f *Finding, c *agentv1.Candidate) {
	if e := d.ca.entry(c.GetEntryId()); e.GetDownstream() || e.GetAdmin() {
		what := "a CA below this one: it signs with it rather than serving a workload"
		if e.GetAdmin() {
			what = "an admin of the CA: it may call the CA's admin API"
		}
		f.add(cause(EntryDownstream, "entry %s for %s is for %s", c.GetEntryId(), c.GetSpiffeId(), what))
	}
	switch {
	case len(c.GetMissingBundles()) > 0:
		f.add(cause(BundleMissing, "%s federates with %s, and the CA has no bundle of it: SVIDs from there cannot be verified", c.GetSpiffeId(), strings.Join(c.GetMissingBundles(), ", ")).
			fix("# on the CA: signet bundle set %s FILE, or signet federation create", quote(c.GetMissingBundles()[0])))
	case c.GetSvid() != nil && !c.GetSvid().GetValid(), c.GetIssuance().GetError() != "":
		f.add(d.issue(c))
	case d.agent() != nil:
		f.add(d.agent())
	}
	for _, p := range d.local.GetProcesses() {
		for _, near := range p.GetCandidates() {
			if near.GetEntryId() == c.GetEntryId() && !near.GetMatches() {
				if x := d.nearest(p, []*agentv1.Candidate{near}); x != nil {
					x.Text = fmt.Sprintf("process %d asked at %s and got nothing; %s", p.GetPid(), clock(p.GetRefusals()[0].GetLastAt()), x.Text)
					f.add(x)
				}
			}
		}
	}
	if len(f.Causes) > 0 {
		return
	}
	if c.GetWatchers() == 0 {
		f.add(cause(NobodyAsked, "entry %s for %s is served here, and no process that matches is subscribed now", c.GetEntryId(), c.GetSpiffeId()).
			fix("# is it the right process? signet why PID"))
		return
	}
	f.add(cause(Served, "entry %s for %s is served: %d subscriptions, its SVID is valid until %s", c.GetEntryId(), c.GetSpiffeId(), c.GetWatchers(), clock(c.GetSvid().GetNotAfter())))
}
