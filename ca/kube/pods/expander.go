package pods

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/registry"
)

// OriginIdentities is the origin of the rules that templated Identities are. Its rules go before all others.
const OriginIdentities = "identities"

// Config says what an Expander works on.
type Config struct {
	Registry *registry.Registry
	// Refused is told once of each pod that does not get what a rule would give it, and again when the reason changes. It
	// must not block, and is called from several goroutines. Nil: nobody is told.
	Refused func(Refusal)
	Log     *slog.Logger     // nil: discarded
	Now     func() time.Time // nil: time.Now
}

// A Refusal is why a pod does not get what a rule would give it.
type Refusal struct {
	Pod          *Pod
	Rule, Reason string
}

// An Expander works out the entries of pods and keeps them in the registry. Its results are the same whatever the order in
// which pods and rules came, so that all replicas agree. It is safe for concurrent use.
type Expander struct {
	c Config

	// mu is held over everything; what is called under it, the registry, asks nobody over the network.
	mu       sync.Mutex
	pods     map[podKey]*state
	rules    []*ranked // those of all origins, first the one that wins
	origins  map[string]bool
	expected map[string]bool // origins that have not told their rules
	synced   map[string]bool // by cluster
	ids      map[spiffeid.ID]*claims
}

type podKey struct{ cluster, uid string }

// state is a pod with what it stands for.
type state struct {
	pod     *Pod
	entries []*derivation
	refused map[*ranked]string // reported reasons
}

// ranked is a rule with its place among all.
type ranked struct {
	Rule
	origin  string
	cluster string // whose pods it is for; empty: all clusters'
	created time.Time
	// owner says who holds the SPIFFE IDs: each Identity its own, the rules of other origins together.
	owner string
}

func (r *ranked) compare(o *ranked) int {
	return cmp.Or(cmp.Compare(r.rank(), o.rank()), r.created.Compare(o.created), strings.Compare(r.Name(), o.Name()), strings.Compare(r.origin, o.origin))
}

func (r *ranked) rank() int {
	if r.origin == OriginIdentities {
		return 0
	}
	return 1
}

// derivation is one entry that a rule makes of a pod.
type derivation struct {
	of    *state
	rule  *ranked
	entry *registry.Entry
	held  bool // it is in the registry: no other rule's is before it
	taken bool // it was reported that a registered entry has its ID
}

// claims are all derivations of one SPIFFE ID, which belongs to one owner.
type claims struct {
	all   map[*derivation]struct{}
	rules map[*ranked]int // that they are by
	owner string
}

// New makes an Expander without pods, with the rules that the registry's templated Identities are.
func New(c Config) *Expander {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Refused == nil {
		c.Refused = func(Refusal) {}
	}
	x := &Expander{c: c, pods: map[podKey]*state{}, origins: map[string]bool{}, expected: map[string]bool{}, synced: map[string]bool{}, ids: map[spiffeid.ID]*claims{}}
	x.takeIdentities()
	c.Registry.Expanded(0) // until Run nobody keeps them so
	return x
}

// Expect says that an origin has rules which are not known yet: until SetRules tells them, no cluster that they are for counts as
// known. "KIND:CLUSTER" is the origin of rules for the pods of one cluster, any other that of rules for all. Call it before the
// CA serves.
func (x *Expander) Expect(origins ...string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, o := range origins {
		x.expected[o] = !x.origins[o]
	}
	x.tellKnown()
}

// Synced says whether all pods of a cluster were told: false at first and when what is known may be far behind. Call it
// with false before the CA serves.
func (x *Expander) Synced(cluster string, synced bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.synced[cluster] = synced
	x.tellKnown()
}

// tellKnown tells the registry which clusters are known. mu is held.
func (x *Expander) tellKnown() {
	for c, synced := range x.synced {
		known := synced
		for origin, missing := range x.expected {
			if _, of, one := strings.Cut(origin, ":"); missing && (!one || of == c) {
				known = false
			}
		}
		x.c.Registry.ClusterKnown(c, known)
	}
}

// Update tells of pods of a cluster that are new or changed, and of the UIDs of those that are gone. Cluster counts, not
// Pod.Cluster.
func (x *Expander) Update(cluster string, changed []*Pod, gone []string) {
	w := &work{x: x}
	x.mu.Lock()
	for _, uid := range gone {
		k := podKey{cluster, uid}
		if s := x.pods[k]; s != nil {
			w.replace(s, nil, func(*derivation) bool { return true })
			delete(x.pods, k)
		}
	}
	for _, p := range changed {
		if p == nil || p.UID == "" {
			continue
		}
		if p.Cluster != cluster {
			moved := *p
			moved.Cluster = cluster
			p = &moved
		}
		k := podKey{cluster, p.UID}
		s := x.pods[k]
		if s == nil {
			s = &state{}
			x.pods[k] = s
		}
		s.pod = p
		w.expandAll(s)
	}
	w.finish()
}

// SetRules replaces the rules of one origin, which are for all clusters' pods, or, of "KIND:CLUSTER", for those of one: who may
// write such a rule in a cluster has no say in others. A rule that is the same value as before is not looked at again.
func (x *Expander) SetRules(origin string, rules []Rule) {
	w := &work{x: x}
	x.mu.Lock()
	before := map[string]*ranked{}
	for _, r := range x.rules {
		if r.origin == origin {
			before[r.Name()] = r
		}
	}
	kept := slices.DeleteFunc(slices.Clone(x.rules), func(r *ranked) bool { return r.origin == origin })
	var fresh []*ranked
	old := map[*ranked]bool{}
	for _, r := range before {
		old[r] = true
	}
	seen := map[string]bool{}
	for _, rule := range rules {
		if seen[rule.Name()] {
			x.c.Log.Error("two rules have one name; the first counts", "rule", rule.Name(), "origin", origin)
			continue
		}
		seen[rule.Name()] = true
		if r := before[rule.Name()]; r != nil && sameRule(r.Rule, rule) {
			kept = append(kept, r)
			delete(old, r)
			continue
		}
		kind, cluster, _ := strings.Cut(origin, ":")
		r := &ranked{Rule: rule, origin: origin, cluster: cluster, owner: "rules of " + kind}
		if origin == OriginIdentities {
			r.owner = rule.Name()
		}
		if c, ok := rule.(interface{ Created() time.Time }); ok {
			r.created = c.Created()
		}
		kept, fresh = append(kept, r), append(fresh, r)
	}
	slices.SortFunc(kept, (*ranked).compare)
	x.rules = kept
	x.origins[origin] = true
	if x.expected[origin] {
		x.expected[origin] = false
	}
	if len(fresh)+len(old) > 0 {
		for _, s := range x.pods {
			w.forget(s, old, fresh)
			var made []*derivation
			for _, r := range fresh {
				made = append(made, w.expand(s, r)...)
			}
			w.replace(s, made, func(d *derivation) bool { return old[d.rule] })
		}
	}
	w.settle()
	x.tellKnown()
	w.unlockAndReport()
}

func sameRule(a, b Rule) bool {
	return reflect.ValueOf(a).Comparable() && reflect.ValueOf(b).Comparable() && a == b
}

func (x *Expander) reportTaken() {
	taken := map[registry.EntryID]*registry.Entry{}
	for _, t := range x.c.Registry.TakenPodEntries() {
		taken[t.Entry.ID] = t.By
	}
	w := &work{x: x}
	x.mu.Lock()
	for _, c := range x.ids {
		for d := range c.all {
			by := taken[d.entry.ID]
			if by != nil && !d.taken {
				w.refused = append(w.refused, Refusal{d.of.pod, d.rule.Name(), takenReason(d.entry, by)})
			}
			d.taken = by != nil
		}
	}
	w.unlockAndReport()
}

// takenReason says why a pod does not get an entry whose SPIFFE ID a registered one has.
func takenReason(e, by *registry.Entry) string {
	return fmt.Sprintf("%s is the SPIFFE ID of %s", e.SPIFFEID, by.Called())
}

// Again expands pods anew by all rules, since something changed that a rule asks about besides the pod.
func (x *Expander) Again(cluster string, uids []string) {
	w := &work{x: x}
	x.mu.Lock()
	for _, uid := range uids {
		if s := x.pods[podKey{cluster, uid}]; s != nil {
			w.expandAll(s)
		}
	}
	w.finish()
}

// IsSynced tells whether all pods of a cluster were told.
func (x *Expander) IsSynced(cluster string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.synced[cluster]
}

// Pod returns what is known of a pod, nil if it is not known.
func (x *Expander) Pod(cluster, uid string) *Pod {
	x.mu.Lock()
	defer x.mu.Unlock()
	if s := x.pods[podKey{cluster, uid}]; s != nil {
		return s.pod
	}
	return nil
}

// Entries returns what a pod stands for by all rules, in order of rule. Whether a registered entry has the SPIFFE ID of one
// is for the registry to say.
func (x *Expander) Entries(cluster, uid string) []*registry.Entry {
	x.mu.Lock()
	defer x.mu.Unlock()
	s := x.pods[podKey{cluster, uid}]
	if s == nil {
		return nil
	}
	held := slices.DeleteFunc(slices.Clone(s.entries), func(d *derivation) bool { return !d.held })
	slices.SortStableFunc(held, func(a, b *derivation) int { return a.rule.compare(b.rule) })
	var out []*registry.Entry
	for _, d := range held {
		out = append(out, d.entry)
	}
	return out
}

// Refusals returns why a pod gets nothing by rules that concern it.
func (x *Expander) Refusals(cluster, uid string) []Refusal {
	x.mu.Lock()
	defer x.mu.Unlock()
	s := x.pods[podKey{cluster, uid}]
	if s == nil {
		return nil
	}
	var out []Refusal
	for r, why := range s.refused {
		out = append(out, Refusal{s.pod, r.Name(), why})
	}
	slices.SortFunc(out, func(a, b Refusal) int { return strings.Compare(a.Rule, b.Rule) })
	return out
}

// work collects what one change changes. The Expander's lock is held while it is made.
type work struct {
	x       *Expander
	dirty   map[spiffeid.ID][]*derivation // IDs whose claims changed, with those that are new
	put     []*registry.Entry
	gone    map[registry.EntryID]bool
	refused []Refusal
}

// eligible tells whether a pod can have identities: it runs, or will, on a node that the CA has seen, and it came from the
// API server.
func (p *Pod) eligible() bool {
	return !p.Mirror && !p.Ended && p.NodeUID != "" && p.UID != "" && p.Namespace != ""
}

// expandAll works out anew what a pod stands for.
func (w *work) expandAll(s *state) {
	var fresh []*derivation
	for _, r := range w.x.rules {
		fresh = append(fresh, w.expand(s, r)...)
	}
	w.replace(s, fresh, func(*derivation) bool { return true })
}

// expand returns what a rule makes of a pod.
func (w *work) expand(s *state, r *ranked) []*derivation {
	if !s.pod.eligible() || r.cluster != "" && r.cluster != s.pod.Cluster {
		delete(s.refused, r)
		return nil
	}
	entries, err := r.Expand(s.pod)
	var out []*derivation
	if err == nil {
		about := &registry.Pod{Cluster: s.pod.Cluster, UID: s.pod.UID, Namespace: s.pod.Namespace, Name: s.pod.Name, NodeUID: s.pod.NodeUID, NodeName: s.pod.NodeName}
		for _, e := range entries {
			if e == nil {
				continue
			}
			own := *e // a rule may hand out what it keeps
			own.BesideEntries = r.origin != OriginIdentities
			if own.CreatedAt = r.created; r.created.IsZero() {
				own.CreatedAt = s.pod.Created
			}
			if err = w.x.c.Registry.Derive(&own, r.Name(), about); err != nil {
				out = nil
				break
			}
			if !slices.ContainsFunc(out, func(d *derivation) bool { return d.entry.ID == own.ID }) {
				out = append(out, &derivation{of: s, rule: r, entry: &own})
			}
		}
	}
	if err != nil {
		w.refuse(s, r, err.Error())
		return nil
	}
	if len(out) == 0 { // with one, settle says whether it stays
		delete(s.refused, r)
	}
	return out
}

// refuse notes why a pod gets nothing by a rule, and reports it unless it was reported already.
func (w *work) refuse(s *state, r *ranked, reason string) {
	if s.refused[r] == reason {
		return
	}
	if s.refused == nil {
		s.refused = map[*ranked]string{}
	}
	s.refused[r] = reason
	w.refused = append(w.refused, Refusal{s.pod, r.Name(), reason})
}

// forget moves what was reported for rules that are gone to those that replace them, so that it is not reported again.
func (w *work) forget(s *state, old map[*ranked]bool, fresh []*ranked) {
	for r, reason := range s.refused {
		if !old[r] {
			continue
		}
		delete(s.refused, r)
		if at := slices.IndexFunc(fresh, func(f *ranked) bool { return f.Name() == r.Name() }); at >= 0 {
			s.refused[fresh[at]] = reason
		}
	}
}

// replace puts fresh in the place of those of a pod's derivations that of accepts.
func (w *work) replace(s *state, fresh []*derivation, of func(*derivation) bool) {
	var kept []*derivation
	former := map[registry.EntryID]*derivation{}
	for _, d := range s.entries {
		if of(d) {
			former[d.entry.ID] = d
		} else {
			kept = append(kept, d)
		}
	}
	for _, d := range fresh {
		old := former[d.entry.ID]
		if old != nil && old.rule == d.rule && same(old.entry, d.entry) {
			delete(former, d.entry.ID)
			kept = append(kept, old)
			continue
		}
		kept = append(kept, d)
		if old != nil {
			d.taken = old.taken
		}
		w.claim(d)
	}
	for _, d := range former {
		w.unclaim(d)
	}
	s.entries = kept
}

// same tells whether two entries of one ID need not be told apart: what depends on the pod is in the ID, what depends on the
// rule in the revision.
func same(a, b *registry.Entry) bool {
	return a.Revision == b.Revision && a.ParentID == b.ParentID && a.CreatedAt.Equal(b.CreatedAt) && *a.Pod == *b.Pod
}

func (w *work) claim(d *derivation) {
	id := d.entry.SPIFFEID
	c := w.x.ids[id]
	if c == nil {
		c = &claims{all: map[*derivation]struct{}{}, rules: map[*ranked]int{}}
		w.x.ids[id] = c
	}
	c.all[d] = struct{}{}
	c.rules[d.rule]++
	w.touch(id, d)
}

func (w *work) unclaim(d *derivation) {
	id := d.entry.SPIFFEID
	c := w.x.ids[id]
	delete(c.all, d)
	if c.rules[d.rule]--; c.rules[d.rule] == 0 {
		delete(c.rules, d.rule)
	}
	if d.held {
		d.held = false
		w.remove(d.entry.ID)
	}
	w.touch(id)
}

func (w *work) touch(id spiffeid.ID, fresh ...*derivation) {
	if w.dirty == nil {
		w.dirty = map[spiffeid.ID][]*derivation{}
	}
	w.dirty[id] = append(w.dirty[id], fresh...)
}

func (w *work) remove(id registry.EntryID) {
	if w.gone == nil {
		w.gone = map[registry.EntryID]bool{}
	}
	w.gone[id] = true
}

// settle decides who holds each SPIFFE ID that was touched: the rules of the owner whose rule goes before all others that
// make it of any pod. What others make of it is refused.
func (w *work) settle() {
	for id, fresh := range w.dirty {
		c := w.x.ids[id]
		if len(c.all) == 0 {
			delete(w.x.ids, id)
			continue
		}
		var first *ranked
		for r := range c.rules {
			if first == nil || r.compare(first) < 0 {
				first = r
			}
		}
		if c.owner != first.owner {
			c.owner, fresh = first.owner, slices.Collect(maps.Keys(c.all))
		}
		for _, d := range fresh {
			if _, still := c.all[d]; !still {
				continue
			}
			switch mine := d.rule.owner == first.owner; {
			case mine && !d.held:
				d.held = true
				w.put = append(w.put, d.entry)
				delete(w.gone, d.entry.ID)
				delete(d.of.refused, d.rule)
			case !mine:
				if d.held {
					d.held = false
					w.remove(d.entry.ID)
				}
				w.refuse(d.of, d.rule, fmt.Sprintf("%s is the SPIFFE ID of %s", id, first.Name()))
			}
		}
	}
	w.dirty = nil
	for _, e := range w.put {
		delete(w.gone, e.ID)
	}
	w.x.c.Registry.SetPodEntries(w.put, slices.Collect(maps.Keys(w.gone)))
	w.put, w.gone = nil, nil
}

// finish settles, unlocks and reports.
func (w *work) finish() {
	w.settle()
	w.unlockAndReport()
}

func (w *work) unlockAndReport() {
	w.x.mu.Unlock()
	for _, r := range w.refused {
		w.x.c.Refused(r)
	}
}
