// Package why names the cause when a process gets no identity, or not the one that it should: from what the agent of its
// node says (signet.agent.v1) and, where it can be asked, from what the CA knows. "signet why" prints what it finds. It
// changes nothing, and what it proposes it writes as commands.
package why

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
)

// A Code names a kind of cause. It stays the same when the text gets better. docs/operate/why.md has the list.
type Code string

// The causes.
const (
	Served Code = "SERVED" // nothing is wrong as far as agent and CA can tell

	// The agent and its CA.
	AgentNeverSynced   Code = "AGENT_NEVER_SYNCED"
	AgentBanned        Code = "AGENT_BANNED"
	AgentEvicted       Code = "AGENT_EVICTED"
	AgentSVIDExpired   Code = "AGENT_SVID_EXPIRED"
	AttestationRefused Code = "ATTESTATION_REFUSED"
	CAUnreachable      Code = "CA_UNREACHABLE"
	CANotTrusted       Code = "CA_NOT_TRUSTED"
	CAOtherTrustDomain Code = "CA_OTHER_TRUST_DOMAIN"
	ClockWrong         Code = "CLOCK_WRONG"

	// The registration entry.
	NoEntry           Code = "NO_ENTRY"
	EntryDeleted      Code = "ENTRY_DELETED"
	EntryExpired      Code = "ENTRY_EXPIRED"
	EntryOtherNode    Code = "ENTRY_OTHER_NODE"
	WrongParent       Code = "WRONG_PARENT"
	EntryDownstream   Code = "ENTRY_DOWNSTREAM"
	HintCollision     Code = "HINT_COLLISION"
	BundleMissing     Code = "FEDERATION_BUNDLE_MISSING"
	OtherTrustDomain  Code = "OTHER_TRUST_DOMAIN"
	UnknownID         Code = "UNKNOWN_ID"
	NobodyAsked       Code = "NOBODY_ASKED"
	SelectorsTwoOfOne Code = "SELECTORS_MUST_ALL_HOLD"

	// What templates make of the pod.
	NoTemplate            Code = "NO_TEMPLATE"
	TemplateRefused       Code = "TEMPLATE_REFUSED"
	NamespaceDiffers      Code = "NAMESPACE_DIFFERS"
	ServiceAccountDiffers Code = "SERVICE_ACCOUNT_DIFFERS"
	OwnerDiffers          Code = "OWNER_DIFFERS"
	ClusterDiffers        Code = "CLUSTER_DIFFERS"

	// The pod, its cluster and its node, as the CA knows them.
	ClusterNotWatched Code = "CLUSTER_NOT_WATCHED"
	ClusterNotSynced  Code = "CLUSTER_NOT_SYNCED"
	PodUnknown        Code = "POD_UNKNOWN"
	PodNotScheduled   Code = "POD_NOT_SCHEDULED"
	PodEnded          Code = "POD_ENDED"
	PodNotSeen        Code = "POD_NOT_SEEN"
	PodLeftOut        Code = "POD_LEFT_OUT"
	PodStatic         Code = "POD_STATIC"
	PodReplaced       Code = "POD_REPLACED"
	PodOtherNode      Code = "POD_OTHER_NODE"
	NodeUnknown       Code = "NODE_UNKNOWN"
	NodeFormer        Code = "NODE_FORMER"
	NodeNotAttested   Code = "NODE_NOT_ATTESTED"
	EntryNotSent      Code = "ENTRY_NOT_SENT"

	// One of its selectors.
	Typo             Code = "TYPO"
	WrongCase        Code = "WRONG_CASE"
	StraySpace       Code = "STRAY_SPACE"
	PathAlias        Code = "PATH_ALIAS"
	PathDiffers      Code = "PATH_DIFFERS"
	ImageForm        Code = "IMAGE_FORM"
	NameForNumber    Code = "NAME_FOR_NUMBER"
	HashDiffers      Code = "HASH_DIFFERS"
	UserDiffers      Code = "USER_DIFFERS"
	GroupDiffers     Code = "GROUP_DIFFERS"
	GroupMissing     Code = "GROUP_MISSING"
	LabelDiffers     Code = "LABEL_DIFFERS"
	LabelMissing     Code = "LABEL_MISSING"
	SelectorDiffers  Code = "SELECTOR_DIFFERS"
	SelectorMissing  Code = "SELECTOR_MISSING"
	TypeNotAttested  Code = "TYPE_NOT_ATTESTED"
	AttestorFailed   Code = "ATTESTOR_FAILED"
	NotInContainer   Code = "NOT_IN_CONTAINER"
	NotInUnit        Code = "NOT_IN_UNIT"
	BinaryReplaced   Code = "BINARY_REPLACED"
	BinaryNotVisible Code = "BINARY_NOT_VISIBLE"

	// The process and its way to the agent.
	ProcessGone      Code = "PROCESS_GONE"
	ProcessHidden    Code = "PROCESS_HIDDEN"
	ForeignNamespace Code = "FOREIGN_PID_NAMESPACE"
	UserChanged      Code = "USER_CHANGED"
	EndpointWrong    Code = "ENDPOINT_WRONG"
	SocketMissing    Code = "SOCKET_MISSING"
	SocketDenied     Code = "SOCKET_DENIED"
	HeaderMissing    Code = "HEADER_MISSING"
	TooManyCalls     Code = "TOO_MANY_CALLS"
	RateLimited      Code = "RATE_LIMITED"
	BadRequest       Code = "BAD_REQUEST"

	// Issuing.
	IssuePending       Code = "ISSUE_PENDING"
	CADiskFull         Code = "CA_DISK_FULL"
	CACannotSign       Code = "CA_CANNOT_SIGN"
	CARateLimited      Code = "CA_RATE_LIMITED"
	TTLBeyondAuthority Code = "TTL_BEYOND_AUTHORITY"
	CARefused          Code = "CA_REFUSED"
	IssuedUnusable     Code = "ISSUED_UNUSABLE"
	AuthorityTainted   Code = "AUTHORITY_TAINTED"

	// The command's way to the agent, before anything can be asked.
	AdminSocketMissing Code = "ADMIN_SOCKET_MISSING"
	AdminSocketDenied  Code = "ADMIN_SOCKET_DENIED"
	AgentNotRunning    Code = "AGENT_NOT_RUNNING"
	NotAdminSocket     Code = "NOT_AN_ADMIN_SOCKET"
)

// A Cause is one thing that is wrong.
type Cause struct {
	Code Code `json:"code"`
	// Text says it in sentences.
	Text string `json:"text"`
	// Fix are commands that change it, ready for a shell; a line that begins with # is an instruction.
	Fix []string `json:"fix,omitempty"`
}

func cause(code Code, format string, args ...any) *Cause {
	return &Cause{Code: code, Text: fmt.Sprintf(format, args...)}
}

func (c *Cause) fix(format string, args ...any) *Cause {
	c.Fix = append(c.Fix, fmt.Sprintf(format, args...))
	return c
}

// A Finding is what came out about one process, or about an ID.
type Finding struct {
	// Process is nil for an ID, and for a pod of which no process is here.
	Process *agentv1.Process
	// Pod is what the CA makes of the pod, or of the process's; nil: it was not asked, or has nothing to say.
	Pod *adminv1.ExplainedPod
	// Causes has the main one first.
	Causes []*Cause
}

// Main is the main cause.
func (f *Finding) Main() *Cause { return f.Causes[0] }

func (f *Finding) add(c *Cause) {
	if c != nil && !slices.ContainsFunc(f.Causes, func(have *Cause) bool { return have.Code == c.Code && have.Text == c.Text }) {
		f.Causes = append(f.Causes, c)
	}
}

// A Target is what is asked about: one of the fields but Cluster.
type Target struct {
	PID int32
	Pod string
	ID  string
	// Cluster is that of the pod, by its name in the CA's configuration; empty: any.
	Cluster string
}

// Request is the target as the agent is asked.
func (t Target) Request() *agentv1.ExplainRequest {
	switch {
	case t.PID != 0:
		return &agentv1.ExplainRequest{Target: &agentv1.ExplainRequest_Pid{Pid: t.PID}}
	case t.Pod != "":
		return &agentv1.ExplainRequest{Target: &agentv1.ExplainRequest_Pod{Pod: t.Pod}}
	}
	return &agentv1.ExplainRequest{Target: &agentv1.ExplainRequest_Id{Id: t.ID}}
}

// An Answer is all that was found out.
type Answer struct {
	Local *agentv1.ExplainResponse
	CA    *CAView
	// Findings has at least one, and for a pod one for each process.
	Findings []Finding
}

// Ask asks the agent, then the CA, and names the causes. ca may be nil; caErr then says why it cannot be asked. agent may be nil for a pod: of pods the
// CA knows much by itself. now is the clock of who asks.
func Ask(ctx context.Context, agent agentv1.AgentClient, ca grpc.ClientConnInterface, caErr error, t Target, now time.Time) (*Answer, error) {
	local, noProcess, err := askAgent(ctx, agent, ca != nil, t)
	if err != nil {
		return nil, err
	}
	a := &Answer{Local: local, CA: &CAView{Err: caErr}}
	if ca != nil {
		a.CA = askCA(ctx, ca, local, t)
	}
	d := &diagnosis{local: local, status: local.GetStatus(), ca: a.CA, now: now, noProcess: noProcess}
	if t.ID != "" {
		a.Findings = []Finding{d.id(t.ID)}
		return a, nil
	}
	for _, p := range local.GetProcesses() {
		a.Findings = append(a.Findings, d.process(p))
	}
	if len(a.Findings) == 0 && t.Pod != "" {
		a.Findings = d.podFindings(t)
	}
	switch {
	case len(a.Findings) > 0:
		return a, nil
	case noProcess != nil:
		return nil, noProcess
	case a.CA.Err != nil:
		return nil, a.CA.Err
	case a.CA.PodsErr != nil:
		return nil, a.CA.PodsErr
	}
	return nil, status.Error(codes.Unimplemented, "the CA cannot say what it makes of a pod: it is of an older version")
}

// askAgent asks the agent. Where it finds no process of a pod and the CA can be asked, noProcess is what it said, and of the
// answer there is the agent's state alone.
func askAgent(ctx context.Context, agent agentv1.AgentClient, more bool, t Target) (local *agentv1.ExplainResponse, noProcess, err error) {
	if agent == nil {
		return &agentv1.ExplainResponse{}, nil, nil
	}
	local, err = agent.Explain(ctx, t.Request())
	if c := status.Code(err); err == nil || t.Pod == "" || !more || c != codes.NotFound && c != codes.FailedPrecondition {
		return local, nil, err
	}
	noProcess = err
	s, err := agent.GetStatus(ctx, &agentv1.GetStatusRequest{})
	if err != nil {
		return nil, nil, err
	}
	return &agentv1.ExplainResponse{Status: s}, noProcess, nil
}

// A diagnosis is one in the making.
type diagnosis struct {
	local  *agentv1.ExplainResponse
	status *agentv1.GetStatusResponse
	ca     *CAView
	now    time.Time
	// noProcess is what the agent said when it found none of a pod's; nil: it did, or was not asked.
	noProcess error
}

// process names the causes for one process.
func (d *diagnosis) process(p *agentv1.Process) Finding {
	f := Finding{Process: p}
	if p.GetError() != "" {
		f.add(cause(ProcessHidden, "the agent cannot look at process %d: %s", p.GetPid(), p.GetError()).
			fix("# let the agent's user see all of /proc: mount it without hidepid, or with gid= of a group of the agent; or run the agent as root"))
		return f
	}
	held, expired, removed, near := sortCandidates(p.GetCandidates())
	if len(held) > 0 {
		d.matched(&f, p, held)
		return f
	}
	d.unmatched(&f, p, expired, removed, near)
	return f
}

// sortCandidates tells apart the entries that match, and those that do not.
func sortCandidates(all []*agentv1.Candidate) (held, expired, removed, near []*agentv1.Candidate) {
	for _, c := range all {
		switch {
		case !c.GetMatches():
			near = append(near, c)
		case c.GetRemovedAt() != nil:
			removed = append(removed, c)
		case c.GetExpired():
			expired = append(expired, c)
		default:
			held = append(held, c)
		}
	}
	return held, expired, removed, near
}

// matched names what is wrong although there are entries.
func (d *diagnosis) matched(f *Finding, p *agentv1.Process, held []*agentv1.Candidate) {
	usable := slices.ContainsFunc(held, func(c *agentv1.Candidate) bool { return c.GetSvid().GetValid() })
	if !usable {
		for _, c := range held {
			f.add(d.issue(c))
		}
		d.refusals(f, p)
		return
	}
	if p.GetEnded() {
		f.add(cause(ProcessGone, "process %d has ended; an entry for it is here by now: the next one like it gets %s", p.GetPid(), held[0].GetSpiffeId()))
	}
	d.endpoint(f, p)
	d.refusals(f, p)
	for _, c := range held {
		if !c.GetSvid().GetValid() {
			f.add(d.issue(c))
		}
		if c.GetShadowedBy() != "" {
			f.add(cause(HintCollision, "entries %s and %s both match and have the same hint %q: of two with one hint the process gets the older one, so not %s",
				c.GetShadowedBy(), c.GetEntryId(), c.GetHint(), c.GetSpiffeId()).
				fix("signet entry update %s --hint %s", quote(c.GetEntryId()), quote(c.GetHint()+"-2")))
		}
		if e := d.ca.entry(c.GetEntryId()); e.GetX509SvidTtl() > 0 && c.GetSvid().GetValid() {
			ttl, life := time.Duration(e.GetX509SvidTtl())*time.Second, c.GetSvid().GetNotAfter().AsTime().Sub(c.GetSvid().GetNotBefore().AsTime())
			if life+time.Minute < ttl {
				f.add(cause(TTLBeyondAuthority, "entry %s asks for SVIDs of %s, and the CA makes them end at %s: no SVID outlives its authority, nor the CA's maximum",
					c.GetEntryId(), ttl, clock(c.GetSvid().GetNotAfter())).fix("signet explain ttl %s", quote(c.GetEntryId())))
			}
		}
		if len(c.GetMissingBundles()) > 0 {
			f.add(cause(BundleMissing, "%s federates with %s, and the CA has no bundle of it: SVIDs from there cannot be verified",
				c.GetSpiffeId(), strings.Join(c.GetMissingBundles(), ", ")).
				fix("# on the CA: signet bundle set %s FILE, or signet federation create", quote(c.GetMissingBundles()[0])))
		}
	}
	if trouble := d.agent(); trouble != nil {
		f.add(trouble)
	}
	for _, c := range held {
		if c.GetSvid().GetValid() && c.GetIssuance().GetError() != "" {
			f.add(d.issue(c))
		}
		if c.GetSvid().GetTainted() || c.GetSvid().GetAuthorityGone() {
			f.add(cause(AuthorityTainted, "the X509-SVID of %s is of authority %s, which is %s: it is renewed with the wave", c.GetSpiffeId(), c.GetSvid().GetAuthority(),
				map[bool]string{true: "no longer in the bundle", false: "tainted"}[c.GetSvid().GetAuthorityGone()]))
		}
	}
	if len(f.Causes) == 0 {
		f.add(served(p, held))
	}
}

func served(p *agentv1.Process, held []*agentv1.Candidate) *Cause {
	var ids []string
	foreign := false
	for _, c := range held {
		if c.GetSvid().GetValid() && c.GetShadowedBy() == "" {
			ids = append(ids, c.GetSpiffeId())
		}
		foreign = foreign || len(c.GetFederatesWith()) > 0
	}
	out := cause(Served, "process %d gets %s: the agent holds valid SVIDs for it", p.GetPid(), strings.Join(ids, ", "))
	if !foreign {
		out.Text += "; peers of other trust domains it cannot verify, since no entry federates with any"
	}
	return out
}

// unmatched names why no entry matches.
func (d *diagnosis) unmatched(f *Finding, p *agentv1.Process, expired, removed, near []*agentv1.Candidate) {
	if d.status.GetRevision() == 0 {
		f.add(d.neverSynced())
		return
	}
	trouble := d.agent()
	elsewhere := d.elsewhere(p)
	if trouble != nil && elsewhere != nil && elsewhere.here {
		f.add(trouble) // the CA has an entry for this very node, and the agent does not hear of it
	}
	for _, c := range expired {
		f.add(d.expired(c))
	}
	if elsewhere != nil && !elsewhere.here {
		f.add(elsewhere.cause)
	}
	near = slices.DeleteFunc(near, func(c *agentv1.Candidate) bool { return d.otherPods(p, c) })
	template, templateCost := d.aboutPod(f, p)
	var nearest *Cause
	if len(near) > 0 {
		nearest = d.nearest(p, near)
		if slices.ContainsFunc(removed, func(c *agentv1.Candidate) bool { return c.GetSpiffeId() == near[0].GetSpiffeId() }) {
			f.add(nearest) // what was deleted was replaced by an entry with a mistake
			nearest = nil
		}
	}
	told := map[string]bool{} // of several with one ID and the same selectors only the one that was deleted last is of interest
	for _, c := range removed {
		what := c.GetSpiffeId() + "\n" + strings.Join(slices.Sorted(slices.Values(c.GetSelectors())), "\n")
		switch {
		case told[what]:
		case c.GetExpired():
			f.add(d.expired(c))
		case strings.HasPrefix(c.GetEntryId(), podEntryPrefix) && len(f.Causes) > 0: // what the CA makes of the pod says it better
		case elsewhere == nil || elsewhere.entryID != c.GetEntryId():
			f.add(d.deleted(c))
		}
		told[what] = true
	}
	if template != nil && nearest != nil && templateCost < distance(near[0]) {
		f.add(template)
	}
	f.add(nearest)
	f.add(template)
	f.add(trouble)
	d.refusals(f, p)
	if len(f.Causes) == 0 {
		f.add(d.noEntry(p))
	}
	d.endpoint(f, p)
}

// noEntry is what remains when nothing comes near.
func (d *diagnosis) noEntry(p *agentv1.Process) *Cause {
	c := cause(NoEntry, "no registration entry of this node comes near process %d (uid %d, %s)", p.GetPid(), p.GetUid(), orUnknown(p.GetExecutable()))
	if d.ca.Err != nil {
		c.Text += "; whether there is one for other nodes only the CA knows, which could not be asked"
	} else {
		c.Text += ", nor one of another node"
	}
	return c.fix("%s", d.create(p))
}

func orUnknown(s string) string {
	if s == "" {
		return "program unknown"
	}
	return s
}

func (d *diagnosis) expired(c *agentv1.Candidate) *Cause {
	return cause(EntryExpired, "entry %s for %s matches, and ended at %s", c.GetEntryId(), c.GetSpiffeId(), clock(c.GetExpiresAt())).
		fix("signet entry update %s --expires-in 0", quote(c.GetEntryId()))
}

func (d *diagnosis) deleted(c *agentv1.Candidate) *Cause {
	out := cause(EntryDeleted, "entry %s for %s matched, and was deleted, or given to other nodes, at %s", c.GetEntryId(), c.GetSpiffeId(), clock(c.GetRemovedAt()))
	if d.ca.Err == nil && d.ca.entry(c.GetEntryId()) == nil {
		out.Text = fmt.Sprintf("entry %s for %s matched, and was deleted at %s", c.GetEntryId(), c.GetSpiffeId(), clock(c.GetRemovedAt()))
	}
	if strings.HasPrefix(c.GetEntryId(), podEntryPrefix) {
		out.Text = fmt.Sprintf("%s, which a template gave the process's pod, was taken back at %s: the pod is gone or ended, or the template was changed", c.GetSpiffeId(), clock(c.GetRemovedAt()))
		return out.fix("# what the CA makes of the pod now: signet why NAMESPACE/POD, where the CA can be asked")
	}
	return out.fix("# who did it: signet audit search --event entry.delete").
		fix("%s", d.createEntry(c.GetSpiffeId(), c.GetSelectors()))
}
