package registry

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/template"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/spiffe"
)

// This file holds which services a namespace of a cluster may speak for: whoever may write CallPolicies there, and nowhere
// else, must not open a service of somebody else's. What a namespace has is said by the templated Identities: below the
// segment that holds its name there are only identities of its own pods.

// A Namespace is one of a cluster.
type Namespace struct {
	Cluster, Name string
	// Clusters are all clusters whose pods can have identities here. Where a template is for more than one of them and does
	// not name the cluster in the ID, namespaces of one name share their identities, and none speaks for them.
	Clusters []string
}

// A NamespaceError says that a policy speaks for a service which is not its namespace's.
type NamespaceError struct{ problem string }

func (e *NamespaceError) Error() string { return e.problem }

const (
	nsVariable      = "{{ .k8s.ns }}"
	clusterVariable = "{{ .k8s.cluster }}"
	anySegment      = "*"
	anyRest         = "**"
)

// A namespaceTemplate is what of a templated Identity says which IDs the pods of a namespace have.
type namespaceTemplate struct {
	name string   // of the Identity
	path []string // in segments; variables are nsVariable, clusterVariable and, all others, anySegment
	ns   int      // where the namespace is, behind segments that are the same for all pods of a cluster; -1: nowhere
	// begin is the text before the first variable.
	begin string
	on    []spiffe.Selector
	ends  time.Time // zero: never
}

// templates are those of all templated Identities, by the entry in which the Identity is stored.
type templates map[EntryID]*namespaceTemplate

// at returns those that have not ended at a moment: no pod has an ID by another one.
func (t templates) at(now time.Time) templates {
	out := make(templates, len(t))
	for id, n := range t {
		if n.ends.IsZero() || now.Before(n.ends) {
			out[id] = n
		}
	}
	return out
}

// noteTemplate looks at the entry of an Identity that was written or deleted.
func (ix *index) noteTemplate(id EntryID) {
	had := ix.templates[id] != nil
	delete(ix.templates, id)
	if e := ix.templated[id]; e != nil && e.Identity != nil {
		n := newNamespaceTemplate(e.Identity.Name, e.Template.Path)
		n.on, n.ends = e.On, e.ExpiresAt
		ix.templates[id] = n
	}
	if had || ix.templates[id] != nil {
		ix.templatesChanged++
	}
}

func newNamespaceTemplate(name string, path template.Path) *namespaceTemplate {
	n := &namespaceTemplate{name: name, ns: -1}
	n.begin, _, _ = strings.Cut(path.String(), "{{")
	static := true // so far
	for i, s := range path.Segments() {
		text := s.Text
		switch {
		case s == template.Segment{Variable: "ns"}:
			text = nsVariable
			if static && n.ns < 0 {
				n.ns = i
			}
		case s == template.Segment{Variable: "cluster"}:
			text = clusterVariable
		case s.Variable != "":
			text, static = anySegment, false
		}
		n.path = append(n.path, text)
	}
	return n
}

// clusters returns which of all clusters the template is for.
func (n *namespaceTemplate) clusters(all []string) []string {
	var named []string
	for _, s := range n.on {
		if c, ok := strings.CutPrefix(s.Value, "cluster:"); ok && s.Type == "k8s_psat" && !slices.Contains(named, c) {
			named = append(named, c)
		}
	}
	switch len(named) {
	case 0:
		return all
	case 1:
		return named
	}
	return nil // no node is of two clusters
}

// in returns the template's path with the variables of a cluster filled in; namespace may be anySegment.
func (n *namespaceTemplate) in(cluster, namespace string) []string {
	out := slices.Clone(n.path)
	for i, s := range out {
		switch s {
		case nsVariable:
			out[i] = namespace
		case clusterVariable:
			out[i] = cluster
		}
	}
	return out
}

// gives tells whether every ID that a service's pattern stands for lies below the namespace's segment of the template.
func (n *namespaceTemplate) gives(ns Namespace, service []string) bool {
	if n.ns < 0 || !slices.Contains(n.clusters(ns.Clusters), ns.Cluster) {
		return false
	}
	prefix, last := n.in(ns.Cluster, ns.Name)[:n.ns+1], n.ns == len(n.path)-1
	if len(service) < len(prefix) || len(service) == len(prefix) && !last {
		return false
	}
	return slices.Equal(prefix, service[:len(prefix)]) // of which none is a wildcard
}

// givesOthers returns a cluster in which pods of other namespaces than ns can have an ID of the service's pattern by the template.
func (n *namespaceTemplate) givesOthers(ns Namespace, service []string) (cluster string, others bool) {
	for _, c := range n.clusters(ns.Clusters) {
		if !overlap(n.in(c, anySegment), service) {
			continue
		}
		if own := c == ns.Cluster && n.ns >= 0 && n.ns < len(service) && service[n.ns] == ns.Name; !own {
			return c, true
		}
	}
	return "", false
}

// overlap tells whether an ID of a template can be one of a service's pattern.
func overlap(template, service []string) bool {
	for i, s := range service {
		switch {
		case s == anyRest:
			return len(template) > i
		case i == len(template):
			return false
		case s != anySegment && template[i] != anySegment && s != template[i]:
			return false
		}
	}
	return len(template) == len(service)
}

// checkNamespace refuses a policy that speaks for a service which is not its namespace's, and makes the plan fail if an
// Identity by which it is changes before it is committed. mu is held.
func (r *Registry) checkNamespace(p *Plan, x *resource, ns Namespace) error {
	td := "spiffe://" + r.c.TrustDomain.Name()
	templates := r.ix.templates.at(r.ix.asOf)
	ids := templates.sorted()
	below := map[string][]*Entry{} // foreign entries, by what their IDs begin with: a policy may have ten thousand patterns
	for _, text := range x.compiled.Services {
		refuse := func(format string, args ...any) error {
			return &NamespaceError{fmt.Sprintf("%s: service %q is not of namespace %q of cluster %q: %s", where(*x.source, "service"), clip(text), ns.Name, ns.Cluster, fmt.Sprintf(format, args...))}
		}
		path, ok := strings.CutPrefix(text, td+"/")
		if !ok {
			return refuse("it is of another trust domain")
		}
		service := strings.Split(path, "/")
		own := slices.IndexFunc(ids, func(id EntryID) bool { return templates[id].gives(ns, service) })
		if own < 0 {
			return refuse("%s; let an admin of the cluster write a ClusterCallPolicy for others", templates.advice(td, ns))
		}
		for _, id := range ids {
			n := templates[id]
			if c, others := n.givesOthers(ns, service); others {
				return refuse("pods of other namespaces or clusters, such as of cluster %q, can have such an ID by Identity %q; write {{ .k8s.cluster }} into its template or name its cluster in `on`, if that is why, or let an admin of the cluster write a ClusterCallPolicy", c, n.name)
			}
		}
		begin := td + "/" + strings.Join(service[:templates[ids[own]].ns+1], "/")
		if e := r.ix.foreign(ns, text, begin, below); e != nil && e.Pod != nil {
			return refuse("%s is that of pod %s/%s of cluster %q by %s; let an admin of the cluster write a ClusterCallPolicy", e.SPIFFEID, e.Pod.Namespace, e.Pod.Name, e.Pod.Cluster, e.Rule)
		} else if e != nil && e.ofOnePod() {
			return refuse("%s was registered as an entry (%s) for one pod, of which it does not say that it is of the namespace; if spire-controller-manager made it, delete it once that has ended ('signet entry delete'), or let an admin of the cluster write a ClusterCallPolicy until then", e.SPIFFEID, e.ID)
		} else if e != nil {
			return refuse("%s was registered as an entry (%s) that is not for pods of the namespace (selector k8s:ns:%s, and its cluster in the Identity's `on` if there are several); let an admin of the cluster write a ClusterCallPolicy",
				e.SPIFFEID, e.ID, ns.Name)
		}
		by := ids[own]
		check := store.Check{Key: entryPrefix + string(by), Modified: r.ix.identity(by).Revision}
		if !slices.ContainsFunc(p.checks, func(c store.Check) bool { return c.Key == check.Key }) {
			p.checks = append(p.checks, check)
		}
	}
	return nil
}

// foreign returns an entry whose ID a service's pattern stands for and which is not for pods of the namespace alone: an
// operator gave a name below the namespace's segment to something else, or a rule that is no Identity gives it to pods elsewhere.
// Begin is what the service begins with, up to that segment; below remembers what was found there.
func (ix *index) foreign(ns Namespace, service, begin string, below map[string][]*Entry) *Entry {
	if _, wild := beforeWildcard(service); !wild {
		id, err := spiffeid.FromString(service)
		if err != nil {
			return nil // no pattern is none
		}
		return ix.foreignOf(ns, id)
	}
	all, looked := below[begin]
	if !looked {
		look := func(id spiffeid.ID) {
			if rest, ok := strings.CutPrefix(id.String(), begin); ok && (rest == "" || rest[0] == '/') {
				if e := ix.foreignOf(ns, id); e != nil {
					all = append(all, e)
				}
			}
		}
		for id := range ix.byID {
			look(id)
		}
		for id := range ix.derived.beside {
			look(id)
		}
		below[begin] = all
	}
	for _, e := range all {
		if policy.ServiceMatches(service, e.SPIFFEID) {
			return e
		}
	}
	return nil
}

// foreignOf returns an entry of an ID that is not for pods of the namespace alone.
func (ix *index) foreignOf(ns Namespace, id spiffeid.ID) *Entry {
	for _, e := range ix.byID[id] {
		if !e.ofNamespace(ns) {
			return e
		}
	}
	if ix.derived.beside[id] == 0 {
		return nil
	}
	for _, e := range ix.derived.byID[id] {
		if e.BesideEntries && (e.Pod.Namespace != ns.Name || e.Pod.Cluster != ns.Cluster) {
			return e
		}
	}
	return nil
}

// ofOnePod tells whether only the processes of one pod can have the entry, whatever pod that is.
func (e *Entry) ofOnePod() bool {
	return slices.ContainsFunc(e.Selectors, func(s spiffe.Selector) bool { return s.Type == "k8s" && strings.HasPrefix(s.Value, "pod-uid:") })
}

// ofNamespace tells whether only pods of a namespace can have the entry.
func (e *Entry) ofNamespace(ns Namespace) bool {
	return slices.Contains(e.Selectors, spiffe.Selector{Type: "k8s", Value: "ns:" + ns.Name}) &&
		(len(ns.Clusters) == 1 || slices.Contains(e.On, spiffe.Selector{Type: psatAttestation, Value: psatCluster + ns.Cluster}))
}

// noteRegistered looks at an entry that was registered in the place of another: policies of namespaces are judged anew if it has an ID
// where namespaces have theirs.
func (ix *index) noteRegistered(old, new *Entry) {
	if new == nil || old != nil && old.SPIFFEID == new.SPIFFEID && slices.Equal(old.Selectors, new.Selectors) && slices.Equal(old.On, new.On) {
		return
	}
	for _, n := range ix.templates {
		if n.ns >= 0 && strings.HasPrefix(new.SPIFFEID.Path(), n.begin) {
			ix.templatesChanged++
			return
		}
	}
}

// noteBeside looks at an entry that a rule other than an Identity made for a pod: policies of namespaces are judged anew if the ID, which
// nobody had by that rule yet, is where another namespace has its own.
func (ix *index) noteBeside(e *Entry, ch *changes) {
	if ix.derived.another(e) {
		return
	}
	for _, n := range ix.templates {
		if n.ns < 0 || !strings.HasPrefix(e.SPIFFEID.Path(), n.begin) {
			continue
		}
		path := strings.Split(e.SPIFFEID.Path()[1:], "/")
		if len(path) <= n.ns || path[n.ns] != e.Pod.Namespace || len(ix.derived.clusters) > 1 {
			ix.templatesChanged++
			ch.namespaces = true
			return
		}
	}
}

func (t templates) sorted() []EntryID {
	out := make([]EntryID, 0, len(t))
	for id := range t {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

// advice says where the services of a namespace are.
func (t templates) advice(td string, ns Namespace) string {
	for _, id := range t.sorted() {
		if n := t[id]; n.ns >= 0 && slices.Contains(n.clusters(ns.Clusters), ns.Cluster) {
			return fmt.Sprintf("its services are those below %s/%s (Identity %q)", td, strings.Join(n.in(ns.Cluster, ns.Name)[:n.ns+1], "/"), n.name)
		}
	}
	return "it has no services, since no templated Identity for its cluster has {{ .k8s.ns }} behind segments that are the same for all pods"
}

// AwaitTemplates returns TemplatesChanged as soon as it is another number than last, or when ctx ends.
func (r *Registry) AwaitTemplates(ctx context.Context, last int) int {
	for {
		r.mu.RLock()
		now, moved := r.ix.templatesChanged, r.applied
		r.mu.RUnlock()
		if now != last {
			return now
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return now
		}
	}
}

// TemplatesChanged returns a number that grows whenever templated Identities change, or an ID below theirs is registered: which services a namespace has may be
// another set then.
func (r *Registry) TemplatesChanged() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.ix.templatesChanged
}
