package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/spiffe"
)

// This file holds the entries that the CA derives from the pods of a cluster. They are in memory only: what the API server
// has is where they come from, on every replica. A node gets those of its own pods by what its attestation has shown of it,
// its cluster and the UID of its node object, and by nothing that an operator, a label or an alias could give it. Nothing
// descends from such an entry. [DESIGN §8, docs/decisions/0036-identities-of-pods.md]

// A Pod says which pod a derived entry is for. It is never changed in place.
type Pod struct {
	Cluster, UID, Namespace, Name string
	NodeUID, NodeName             string
}

// Selectors by which a node has shown which node of which cluster it is.
const (
	psatAttestation = "k8s_psat"
	psatCluster     = "cluster:"
	psatNodeUID     = "agent_node_uid:"
)

// podEntryPrefix starts the entry IDs of pods. Nobody can register there.
const podEntryPrefix = "signet.pod."

// PodEntryPrefix starts the IDs of all entries of a cluster's pods, and of no other cluster's.
func PodEntryPrefix(cluster string) string {
	plain := cluster != "" && len(cluster) <= 63 && !strings.ContainsFunc(cluster, func(c rune) bool {
		return c >= 0x80 || c == '.' || c == '_' || !isNameByte(byte(c))
	})
	if !plain {
		h := sha256.Sum256([]byte(cluster))
		cluster = "_" + hex.EncodeToString(h[:8])
	}
	return podEntryPrefix + cluster + "."
}

// ruleInID is what the IDs of all entries that a rule makes have in common after the cluster's prefix. Of two entries that were
// created in the same second the one with the smaller ID goes first: so that of two rules one goes first with every pod, by name.
func ruleInID(rule string) string {
	const most = 100
	_, name, _ := strings.Cut(rule, " ")
	b := []byte(name[:min(len(name), most)])
	for i, c := range b {
		if !isNameByte(c) {
			b[i] = '-'
		}
	}
	h := sha256.Sum256([]byte(rule))
	return string(b) + "." + hex.EncodeToString(h[:4])
}

// Derive completes an entry that rule makes for a pod: its ID, which is the same on every replica and after every start, its
// parent and its selectors. Then it checks it.
func (r *Registry) Derive(e *Entry, rule string, pod *Pod) error {
	e.Pod, e.Rule, e.OnNodes = pod, rule, true
	e.Selectors = sortedSelectors(append(slices.Clip(e.Selectors), spiffe.Selector{Type: "k8s", Value: "pod-uid:" + pod.UID}))
	e.On = sortedSelectors(e.On)
	e.FederatesWith = sortedTrustDomains(e.FederatesWith)
	h := sha256.New()
	part := func(s string) {
		h.Write(strconv.AppendInt(nil, int64(len(s)), 10))
		h.Write([]byte{':'})
		h.Write([]byte(s))
	}
	part(pod.UID)
	part(rule)
	part(e.SPIFFEID.String())
	for _, s := range e.Selectors {
		part(s.Type)
		part(s.Value)
	}
	for _, n := range e.DNSNames {
		part(n)
	}
	e.ID = EntryID(PodEntryPrefix(pod.Cluster) + ruleInID(rule) + hex.EncodeToString(h.Sum(nil)[:16]))
	e.ParentID = podsOf(r.c.TrustDomain, podNodeKey{pod.Cluster, pod.NodeUID}, e.On)
	if e.Admin || e.Downstream || e.Canary || e.StoreSVID {
		return invalid("spiffe_id", e.SPIFFEID.String(), "an identity of pods cannot be admin, downstream, canary or store_svid")
	}
	return e.validate(r.c.TrustDomain)
}

// podNodeKey names one node of one cluster.
type podNodeKey struct{ cluster, uid string }

// podNode tells which node of which cluster an agent runs on, if its attestation has shown it.
func podNode(n *Node) (podNodeKey, bool) {
	if n == nil || n.Attestation != psatAttestation {
		return podNodeKey{}, false
	}
	var k podNodeKey
	for _, s := range n.Selectors {
		if s.Type != psatAttestation {
			continue
		}
		if v, ok := strings.CutPrefix(s.Value, psatCluster); ok {
			if k.cluster != "" {
				return podNodeKey{}, false // two answers are none
			}
			k.cluster = v
		}
		if v, ok := strings.CutPrefix(s.Value, psatNodeUID); ok {
			if k.uid != "" {
				return podNodeKey{}, false
			}
			k.uid = v
		}
	}
	return k, k.cluster != "" && k.uid != ""
}

// podsOf is the parent of the entries of a node's pods, by rules that are for nodes whose selectors include all of on.
func podsOf(td spiffeid.TrustDomain, k podNodeKey, on []spiffe.Selector) spiffeid.ID {
	h := sha256.New()
	h.Write([]byte(k.cluster))
	h.Write([]byte{0})
	h.Write([]byte(k.uid))
	path := nodesPathPrefix + "pods/" + hex.EncodeToString(h.Sum(nil)[:16])
	if len(on) > 0 {
		h.Reset()
		for _, s := range on {
			h.Write([]byte(s.String()))
			h.Write([]byte{0})
		}
		path += "/" + hex.EncodeToString(h.Sum(nil)[:16])
	}
	return mustID(td, path)
}

// derived is the part of the index that does not come from the store. It outlives an index that is read afresh.
type derived struct {
	entries map[EntryID]*Entry
	byRoot  map[spiffeid.ID]map[EntryID]*Entry
	byID    map[spiffeid.ID]map[EntryID]*Entry
	groups  map[podNodeKey]map[spiffeid.ID]*nodeGroup
	rules   map[string]int // entries by rule
	// beside are the SPIFFE IDs that rules other than Identities make, with the number of their entries: nothing but these entries says
	// whose pods have them.
	beside map[spiffeid.ID]int
	ending map[EntryID]*Entry
	// clusters are those that are watched; false: what pods one has is not known yet, or not any more.
	clusters map[string]bool
	// told is how new what is here is at most, followed up to where it is whole.
	told, followed map[string]Position
}

func newDerived() *derived {
	return &derived{entries: map[EntryID]*Entry{}, byRoot: map[spiffeid.ID]map[EntryID]*Entry{}, byID: map[spiffeid.ID]map[EntryID]*Entry{},
		groups: map[podNodeKey]map[spiffeid.ID]*nodeGroup{}, rules: map[string]int{}, beside: map[spiffeid.ID]int{}, ending: map[EntryID]*Entry{}, clusters: map[string]bool{},
		told: map[string]Position{}, followed: map[string]Position{}}
}

// podRoots adds to roots what the node has by its pods: the place of its own pods always, so that its followers are found
// when the first comes.
func (ix *index) podRoots(td spiffeid.TrustDomain, n *Node, roots map[spiffeid.ID]bool) {
	k, ok := podNode(n)
	if !ok {
		return
	}
	roots[podsOf(td, k, nil)] = true
	for id, g := range ix.derived.groups[k] {
		if matches(MatchSuperset, n.Selectors, g.on) {
			roots[id] = true
		}
	}
}

// entry returns a registered entry or one of a pod.
func (ix *index) entry(id EntryID) *Entry {
	if e := ix.entries[id]; e != nil {
		return e
	}
	return ix.derived.entries[id]
}

// takenBy returns the registered entry whose SPIFFE ID a derived entry must not have, nil if there is none. What was
// registered always goes first, until it ends: a pod cannot come by the ID of what an operator named by choosing its labels.
func (ix *index) takenBy(e *Entry) *Entry {
	var by *Entry
	for _, s := range ix.byID[e.SPIFFEID] {
		if s.Expired(ix.asOf) || e.BesideEntries && s.Identity == nil && !s.alias() && !s.Admin && !s.Downstream {
			continue
		}
		if by == nil || s.ID < by.ID {
			by = s
		}
	}
	return by
}

// holds tells whether a derived entry is one now.
func (ix *index) holds(e *Entry, now time.Time) bool { return !e.Expired(now) && ix.takenBy(e) == nil }

// retake lets followers look again at the entries of pods whose SPIFFE ID a registered entry takes or gives back.
func (ix *index) retake(old, new *Entry, ch *changes) {
	for _, e := range []*Entry{old, new} {
		if e == nil || e == new && old != nil && old.SPIFFEID == new.SPIFFEID {
			continue
		}
		for _, d := range ix.derived.byID[e.SPIFFEID] {
			ch.taken = true
			ch.entries = append(ch.entries, entryChange{d, d})
		}
	}
}

// registered yields every SPIFFE ID that an entry has, once.
func (ix *index) registered() iter.Seq[spiffeid.ID] {
	return func(yield func(spiffeid.ID) bool) {
		for id := range ix.byID {
			if !yield(id) {
				return
			}
		}
		for id := range ix.derived.byID {
			if len(ix.byID[id]) == 0 && !yield(id) {
				return
			}
		}
	}
}

// holders yields the entries that have a SPIFFE ID.
func (ix *index) holders(id spiffeid.ID) iter.Seq[*Entry] {
	return func(yield func(*Entry) bool) {
		for _, e := range ix.byID[id] {
			if !yield(e) {
				return
			}
		}
		for _, e := range ix.derived.byID[id] {
			if ix.takenBy(e) == nil && !yield(e) {
				return
			}
		}
	}
}

// SetPodEntries puts entries that Derive has completed into the index, in the place of those with the same ID, and removes
// others. It does not touch the store, and no revision moves by it.
func (r *Registry) SetPodEntries(put []*Entry, gone []EntryID) {
	const atOnce = 1000 // readers wait no longer than for so many
	for len(put)+len(gone) > 0 {
		p, g := put[:min(len(put), atOnce)], gone[:min(len(gone), atOnce)]
		put, gone = put[len(p):], gone[len(g):]
		r.setPodEntries(p, g)
	}
}

func (r *Registry) setPodEntries(put []*Entry, gone []EntryID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ch changes
	for _, id := range gone {
		if old := r.ix.derived.entries[id]; old != nil {
			r.ix.changePodEntry(r.c.TrustDomain, old, nil, &ch)
		}
	}
	for _, e := range put {
		r.ix.changePodEntry(r.c.TrustDomain, r.ix.derived.entries[e.ID], e, &ch)
	}
	r.follow.mark(r.ix, &ch)
	r.notifyChanged(&ch)
}

func (ix *index) changePodEntry(td spiffeid.TrustDomain, old, new *Entry, ch *changes) {
	d := ix.derived
	if old != nil {
		drop(d.byRoot, old.ParentID, old.ID)
		drop(d.byID, old.SPIFFEID, old.ID)
		delete(d.entries, old.ID)
		delete(d.ending, old.ID)
		delete(ix.ended, old.ID)
		if d.rules[old.Rule]--; d.rules[old.Rule] == 0 {
			delete(d.rules, old.Rule)
		}
		if old.BesideEntries {
			if d.beside[old.SPIFFEID]--; d.beside[old.SPIFFEID] == 0 {
				delete(d.beside, old.SPIFFEID)
			}
		}
		if len(d.byID[old.SPIFFEID]) == 0 {
			ix.who++
		}
		ix.countGroup(td, old, -1, ch)
	}
	if new != nil {
		if len(d.byID[new.SPIFFEID]) == 0 {
			ix.who++
		}
		d.entries[new.ID] = new
		put(d.byRoot, new.ParentID, new.ID, new)
		put(d.byID, new.SPIFFEID, new.ID, new)
		if !new.ExpiresAt.IsZero() {
			d.ending[new.ID] = new
		}
		d.rules[new.Rule]++
		if new.BesideEntries {
			d.beside[new.SPIFFEID]++
			ix.noteBeside(new, ch)
		}
		ix.countGroup(td, new, +1, ch)
		ch.taken = ch.taken || ix.takenBy(new) != nil
	}
	for _, e := range []*Entry{old, new} {
		if e != nil && !d.another(e) && ix.noteHint(e.SPIFFEID) {
			ch.policySide = true
		}
	}
	ch.entries = append(ch.entries, entryChange{old, new})
}

// another tells whether there is surely another entry of the same ID by the same rule, so that e makes no difference to what
// is known of the ID. It does not look through all.
func (d *derived) another(e *Entry) bool {
	looked := 0
	for _, o := range d.byID[e.SPIFFEID] {
		if o != e && o.Rule == e.Rule && o.Revision == e.Revision {
			return true
		}
		if looked++; looked > 1 {
			break
		}
	}
	return false
}

// countGroup notes which of its pods' groups a node is asked about.
func (ix *index) countGroup(td spiffeid.TrustDomain, e *Entry, n int, ch *changes) {
	if len(e.On) == 0 {
		return
	}
	k := podNodeKey{e.Pod.Cluster, e.Pod.NodeUID}
	groups := ix.derived.groups[k]
	g := groups[e.ParentID]
	if g == nil {
		g = &nodeGroup{on: e.On}
		put(ix.derived.groups, k, e.ParentID, g)
		ch.podNodes = append(ch.podNodes, podsOf(td, k, nil))
	}
	if g.entries += n; g.entries == 0 {
		drop(ix.derived.groups, k, e.ParentID)
		ch.podNodes = append(ch.podNodes, podsOf(td, k, nil))
	}
}

// ClusterKnown says whether all pods of a cluster were told. Until then an agent of that cluster drops nothing that it
// holds for pods, and what it asks for of pods that are not known is answered by ErrNotReady.
func (r *Registry) ClusterKnown(cluster string, known bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	was, watched := r.ix.derived.clusters[cluster]
	r.ix.derived.clusters[cluster] = known
	if known && watched && !was {
		r.follow.markKnown()
	}
}

// unknownOf returns the beginnings of entry IDs of which nothing is known to be absent for an agent.
func (ix *index) unknownOf(agent spiffeid.ID) []string {
	k, ok := podNode(ix.nodes[agent])
	if !ok {
		return nil
	}
	if known, watched := ix.derived.clusters[k.cluster]; !watched || known {
		return nil
	}
	return []string{PodEntryPrefix(k.cluster)}
}

// unknownClusters returns the clusters whose pods are not known, in order.
func (ix *index) unknownClusters() []string {
	var out []string
	for c, known := range ix.derived.clusters {
		if !known {
			out = append(out, c)
		}
	}
	slices.Sort(out)
	return out
}

// PodsUnknown tells whether it is not known yet which pods run on the agent's node.
func (r *Registry) PodsUnknown(agent spiffeid.ID) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.ix.unknownOf(agent)) > 0
}

// Missing is the reason why an agent may not have an entry: ErrNotFound, or ErrNotReady as long as the entry may be one of
// a pod that the CA, or this replica of it, has not heard of yet.
func (r *Registry) Missing(agent spiffeid.ID, id EntryID) error {
	if !strings.HasPrefix(string(id), podEntryPrefix) {
		return ErrNotFound
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, p := range r.ix.unknownOf(agent) {
		if strings.HasPrefix(string(id), p) {
			return ErrNotReady
		}
	}
	if k, ok := podNode(r.ix.nodes[agent]); ok && strings.HasPrefix(string(id), PodEntryPrefix(k.cluster)) && r.follow.isBehind(agent) {
		return ErrNotReady
	}
	return ErrNotFound
}

// A TakenEntry is a derived entry that counts for nothing, since its SPIFFE ID is that of a registered one.
type TakenEntry struct {
	Entry, By *Entry
}

// Called is what an operator knows the entry by.
func (e *Entry) Called() string {
	if e.Identity != nil {
		return "Identity " + e.Identity.Name
	}
	return "entry " + string(e.ID)
}

// TakenPodEntries returns all of them.
func (r *Registry) TakenPodEntries() []TakenEntry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []TakenEntry
	for id, entries := range r.ix.derived.byID {
		if len(r.ix.byID[id]) == 0 {
			continue
		}
		for _, e := range entries {
			if by := r.ix.takenBy(e); by != nil {
				out = append(out, TakenEntry{e, by})
			}
		}
	}
	return out
}

// TakenBy returns the registered entry for which a derived one counts for nothing, since it has its SPIFFE ID; nil if there is
// none. Who gives a pod something by a derived entry without asking for the entry here must ask this.
func (r *Registry) TakenBy(e *Entry) *Entry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.ix.takenBy(e)
}

// TakenChanged is signalled when TakenPodEntries may have changed.
func (r *Registry) TakenChanged() <-chan struct{} { return r.takenChanged }

// PodEntries returns the entries of pods that keep accepts, in no order. keep must be quick and must not call the registry.
func (r *Registry) PodEntries(keep func(*Entry) bool) []*Entry {
	now := r.c.Now()
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []*Entry
	for _, e := range r.ix.derived.entries {
		if r.ix.holds(e, now) && keep(e) {
			out = append(out, e)
		}
	}
	return out
}

// Everybody returns every SPIFFE ID that a registered entry or a pod has, once and in no order, patterns of those that templated
// Identities stand for, and the clusters whose pods are not known now.
func (r *Registry) Everybody() (ids []spiffeid.ID, templates, unknown []string) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	ids = slices.AppendSeq(make([]spiffeid.ID, 0, len(r.ix.byID)+len(r.ix.derived.byID)), r.ix.registered())
	return ids, r.ix.templatePatterns(r.c.TrustDomain), r.ix.unknownClusters()
}

// UnknownClusters returns the clusters whose pods are not known now, in order.
func (r *Registry) UnknownClusters() []string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.ix.unknownClusters()
}

// CountPodEntries returns how many entries of pods there are, by one rule or, with "", by all.
func (r *Registry) CountPodEntries(rule string) int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if rule == "" {
		return len(r.ix.derived.entries)
	}
	return r.ix.derived.rules[rule]
}

// noteHints works out anew the hints of pods, in an index that was read afresh.
func (ix *index) noteHints() {
	for id := range ix.derived.byID {
		ix.noteHint(id)
	}
}
