package registry

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/ca/template"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/spiffe"
)

// This file holds templated Identities: one record each, which stands for the entries of all pods that it concerns.

// A Template is what makes an Identity a templated one. The Entry that has it says what the entries of its pods have in
// common; it has no SPIFFE ID itself, and its Selectors are the whole of `match`.
type Template struct {
	Path     template.Path
	DNSNames []template.DNSName

	match   []template.Match  // what the CA judges
	process []spiffe.Selector // what is left for agents
}

// templateRecordVersion is the version of a record of a templated Identity. A CA that does not know of them refuses it:
// agents would drop what they hold for pods if it went on without.
const templateRecordVersion = 2

// samplePath stands for any path.
const samplePath = "/x"

func newTemplate(path string, dnsNames []string, match []spiffe.Selector) (*Template, error) {
	t := &Template{}
	var err error
	if t.Path, err = template.ParsePath(path); err != nil {
		return nil, err
	}
	for _, n := range dnsNames {
		d, err := template.ParseDNSName(n)
		if err != nil {
			return nil, err
		}
		t.DNSNames = append(t.DNSNames, d)
	}
	for _, s := range match {
		if m, ok := template.ParseMatch(s.Value); ok && s.Type == "k8s" {
			t.match = append(t.match, m)
		} else {
			t.process = append(t.process, s)
		}
	}
	return t, nil
}

// RuleName is what the rule of an Identity is called.
func RuleName(identity string) string { return "Identity " + identity }

// Expand returns the entry that the Identity stands for in the case of a pod, without what Derive fills in; nil if it does not
// concern the pod; or why the pod gets none.
func (e *Entry) Expand(td spiffeid.TrustDomain, pod *template.Pod) (*Entry, error) {
	t := e.Template
	for _, on := range e.On {
		// No node of the pod's cluster has it. So the pod takes no ID from another one either.
		if c, ok := strings.CutPrefix(on.Value, psatCluster); ok && on.Type == psatAttestation && c != pod.Cluster {
			return nil, nil
		}
	}
	for _, m := range t.match {
		if !m.Holds(pod) {
			return nil, nil
		}
	}
	path, err := t.Path.Expand(pod)
	if err != nil {
		return nil, fmt.Errorf("spiffeID: %w", err)
	}
	out := *e
	out.Template, out.Identity, out.DNSNames = nil, nil, nil
	if out.SPIFFEID, err = spiffeid.FromPath(td, path); err != nil {
		return nil, fmt.Errorf("spiffeID: %w", err)
	}
	for _, d := range t.DNSNames {
		name, err := d.Expand(pod)
		if err != nil {
			return nil, fmt.Errorf("dnsNames: %w", err)
		}
		out.DNSNames = append(out.DNSNames, name)
	}
	out.Selectors = t.process
	return &out, nil
}

// parseTemplate reads what is templated in an Identity.
func parseTemplate(doc strictyaml.Document, in *identityDocument, e *Entry, td spiffeid.TrustDomain) error {
	path, whole := strings.CutPrefix(in.SPIFFEID, td.IDString())
	skip := 0
	if whole {
		skip = len(td.IDString())
	}
	at := func(field string, i, skip int, err error) error {
		s, ok := errors.AsType[*template.SyntaxError](err)
		if !ok {
			return err
		}
		return fmt.Errorf("%s: %s: %s", inValue(doc, field, i, skip+s.Offset), field, s.Problem)
	}
	switch {
	case !template.Is(in.SPIFFEID):
		return fmt.Errorf("%s: dnsNames: a template needs one in spiffeID, too", where(doc, "dnsNames"))
	case in.Admin:
		return fmt.Errorf("%s: admin: templates make no admins: whoever may create pods would become one; name the admin by a plain Identity", where(doc, "admin"))
	case in.Canary:
		return fmt.Errorf("%s: canary: a template is no canary; name one ID that nobody uses by a plain Identity", where(doc, "canary"))
	case strings.HasPrefix(in.SPIFFEID, "spiffe://") && !whole:
		return fmt.Errorf("%s: spiffeID: %q must be in trust domain %q", where(doc, "spiffeID"), clip(in.SPIFFEID), td.Name())
	}
	if _, err := template.ParsePath(path); err != nil {
		return at("spiffeID", -1, skip, err)
	}
	for i, n := range in.DNSNames {
		if _, err := template.ParseDNSName(n); err != nil {
			return at("dnsNames", i, 0, err)
		}
	}
	var err error
	e.Template, err = newTemplate(path, in.DNSNames, e.Selectors)
	return err
}

// inValue returns file:line:column of the byte after n bytes of a field's value, or of item i of it.
func inValue(doc strictyaml.Document, field string, i, n int) string {
	m := mapping(doc.Node)
	if m == nil {
		return where(doc, field)
	}
	for k := 0; k+1 < len(m.Content); k += 2 {
		if m.Content[k].Value != field {
			continue
		}
		v := m.Content[k+1]
		if i >= 0 && i < len(v.Content) {
			v = v.Content[i]
		}
		col := v.Column
		switch v.Style {
		case yaml.LiteralStyle, yaml.FoldedStyle: // its text begins elsewhere
		case yaml.SingleQuotedStyle, yaml.DoubleQuotedStyle:
			col += n + 1
		default:
			col += n
		}
		return fmt.Sprintf("%s:%d:%d", doc.File, v.Line, col)
	}
	return where(doc, field)
}

// validateTemplate refuses what no pod could have. The entry has been normalised.
func (e *Entry) validateTemplate(td spiffeid.TrustDomain) error {
	sample := *e
	sample.Template, sample.SPIFFEID = nil, mustID(td, samplePath)
	sample.ParentID = nodesID(td, e.On)
	sample.Selectors = append(slices.Clip(e.Selectors), spiffe.Selector{Type: "k8s", Value: "pod-uid:x"})
	sample.DNSNames = nil
	for _, d := range e.Template.DNSNames {
		sample.DNSNames = append(sample.DNSNames, d.Sample())
	}
	if len(e.Selectors) == MaxSelectors {
		return invalid("selectors", "", "at most %d are allowed in a template", MaxSelectors-1)
	}
	return sample.validate(td)
}

// IDText is the SPIFFE ID of an entry, or the template of it.
func (e *Entry) IDText() string {
	if e.Template != nil {
		return e.Template.Path.String()
	}
	return e.SPIFFEID.String()
}

// identity returns what an Identity was made into, by its entry ID.
func (ix *index) identity(id EntryID) *Entry {
	if e := ix.templated[id]; e != nil {
		return e
	}
	return ix.entries[id]
}

// dropTemplated takes a templated Identity out of the index, if there is one.
func (ix *index) dropTemplated(id EntryID, at store.Revision, ch *changes) {
	old := ix.templated[id]
	if old == nil {
		return
	}
	ch.templated, ix.templatedAt = true, at
	delete(ix.templated, id)
	if ix.similar[old.similar()] == id {
		delete(ix.similar, old.similar())
	}
	delete(ix.ending, id)
	delete(ix.ended, id)
}

func (ix *index) addTemplated(e *Entry, at store.Revision, ch *changes) {
	ch.templated, ix.templatedAt = true, at
	ix.templated[e.ID] = e
	ix.similar[e.similar()] = e.ID
	if !e.ExpiresAt.IsZero() {
		ix.ending[e.ID] = e
	}
}

// Pattern returns the pattern of the SPIFFE IDs that a templated Identity stands for.
func (e *Entry) Pattern(td spiffeid.TrustDomain) string {
	var b strings.Builder
	b.WriteString(td.IDString())
	for _, s := range e.Template.Path.Segments() {
		b.WriteByte('/')
		if s.Variable != "" {
			s.Text = anySegment
		}
		b.WriteString(s.Text)
	}
	return b.String()
}

// templatePatterns returns the patterns of all that have not ended, in order.
func (ix *index) templatePatterns(td spiffeid.TrustDomain) []string {
	var out []string
	for _, e := range ix.templated {
		if !e.Expired(ix.asOf) {
			out = append(out, e.Pattern(td))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// templatePatterns returns the patterns of those that the plan writes.
func (p *Plan) templatePatterns(td spiffeid.TrustDomain) []string {
	var out []string
	for _, e := range p.entries {
		if e.Template != nil {
			out = append(out, e.Pattern(td))
		}
	}
	return out
}

// endTemplated lets all look again at a templated Identity that came to its end, or has not ended after all.
func (ix *index) endTemplated(e *Entry, ch *changes) {
	ch.templated, ix.templatedAt = true, ix.revision
	if ix.templates[e.ID] != nil {
		ix.templatesChanged++
		ch.namespaces = true
	}
}

// Templates returns the templated Identities that have not ended in order of name, and the revision that this is as of. One that
// has ended stands for no pods, and claims no SPIFFE IDs.
func (r *Registry) Templates() ([]*Entry, store.Revision) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := slices.Collect(maps.Values(r.ix.templated))
	out = slices.DeleteFunc(out, func(e *Entry) bool { return e.Expired(r.ix.asOf) })
	slices.SortFunc(out, func(a, b *Entry) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return out, r.ix.revision
}

// TemplatedChanged is signalled when Templates may have changed.
func (r *Registry) TemplatedChanged() <-chan struct{} { return r.templatesChanged }

// Expanded says that the entries of pods are as the templated Identities of a revision have it. From then on whoever waits
// for a later change of one waits for its pods' entries too, until 0 says that nobody expands any more.
func (r *Registry) Expanded(rev store.Revision) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expanded = rev
	r.moved()
}

// warnTemplates says what of a plan stands for nothing, and what it takes from pods. mu is held.
func (r *Registry) warnTemplates(p *Plan) {
	templates := len(r.ix.templated) > 0
	for _, e := range p.entries {
		r.warnSelectors(p, e)
		if e.Template == nil {
			r.warnTaken(p, e)
			continue
		}
		templates = true
		if e.Expired(r.c.Now()) {
			p.warn(e, "has ended (expiresAt %s): it stands for no pods", e.ExpiresAt.Format(time.RFC3339))
		}
	}
	if !templates {
		return
	}
	if len(r.ix.derived.clusters) == 0 && slices.ContainsFunc(p.entries, func(e *Entry) bool { return e.Template != nil }) {
		p.Warnings = append(p.Warnings, Warning{Text: "templated Identities stand for pods, and this CA watches no cluster: name one in its configuration (kubernetes.clusters.NAME.pods)"})
	}
	unknown := r.ix.unknownClusters()
	if len(unknown) > 0 && slices.ContainsFunc(p.writes, func(w store.Write) bool { return w.Key == defaultsKey || strings.HasPrefix(w.Key, policyPrefix) }) {
		p.Warnings = append(p.Warnings, Warning{Text: fmt.Sprintf("which pods the cluster %q has is not known now: whom a change of policies locks out is worked out from the templates of Identities alone, and there may be more", unknown[0])})
	}
}

// warn says something about the Identity of an entry.
func (p *Plan) warn(e *Entry, format string, args ...any) {
	p.Warnings = append(p.Warnings, Warning{Ref{KindIdentity, e.Identity.Name}, fmt.Sprintf("Identity %q ", e.Identity.Name) + fmt.Sprintf(format, args...)})
}

// podSelectors are the kinds of selectors that an agent makes of pods, as SPIRE's does.
var podSelectors = []string{"ns", "sa", "pod-name", "pod-uid", "pod-label", "pod-owner", "pod-owner-uid", "pod-image", "pod-image-count", "pod-init-image", "pod-init-image-count",
	"container-name", "container-image", "node-name", "namespace-label"}

// warnSelectors says which selectors of an entry nothing will ever have, as after a typing error.
func (r *Registry) warnSelectors(p *Plan, e *Entry) {
	for _, s := range e.Selectors {
		kind, _, _ := strings.Cut(s.Value, ":")
		if s.Type != "k8s" || slices.Contains(podSelectors, kind) || e.Template != nil && kind == "ns-label" {
			continue
		}
		known := strings.Join(podSelectors, ", k8s:")
		if e.Template != nil {
			known += ", and in templates k8s:ns-label"
		}
		p.warn(e, "matches nothing where an agent of signet runs: it makes no selectors k8s:%s, as in match %q, but k8s:%s", kind, s, known)
	}
	if e.Template == nil || len(r.ix.derived.clusters) == 0 {
		return
	}
	for _, s := range e.On {
		cluster, ok := strings.CutPrefix(s.Value, psatCluster)
		if _, watched := r.ix.derived.clusters[cluster]; s.Type == psatAttestation && ok && !watched {
			p.warn(e, "stands for no pods: this CA watches no cluster %q, as in on %q, but %s", cluster, s, strings.Join(slices.Sorted(maps.Keys(r.ix.derived.clusters)), ", "))
		}
	}
}

// warnTaken says which pods a plain Identity takes its SPIFFE ID from, and whom else it makes an admin.
func (r *Registry) warnTaken(p *Plan, e *Entry) {
	if e.Expired(r.c.Now()) {
		return
	}
	old := r.ix.entries[e.ID]
	if e.Admin && (old == nil || !old.Admin || old.SPIFFEID != e.SPIFFEID) {
		for _, x := range r.ix.byID[e.SPIFFEID] {
			if x.ID != e.ID && !x.Expired(r.ix.asOf) && (x.Owner != "" || x.Identity != nil && x.Identity.Owner != e.Identity.Owner) {
				p.Dangers = append(p.Dangers, fmt.Sprintf("Identity %q makes an admin of whoever has %s by %s, which comes from a custom resource; delete that first, or choose an ID that nobody else has", e.Identity.Name, e.SPIFFEID, x.Called()))
			}
		}
	}
	if old != nil && old.SPIFFEID == e.SPIFFEID {
		return
	}
	var one *Entry
	n := 0
	for d := range r.ix.holders(e.SPIFFEID) {
		if d.Pod == nil {
			continue
		}
		if n++; one == nil || d.ID < one.ID {
			one = d
		}
	}
	if n == 0 {
		return
	}
	text := fmt.Sprintf("takes %s from %d pods, such as %s/%s, which have it by %s", e.SPIFFEID, n, one.Pod.Namespace, one.Pod.Name, one.Rule)
	if n == 1 {
		text = fmt.Sprintf("takes %s from the pod %s/%s, which has it by %s", e.SPIFFEID, one.Pod.Namespace, one.Pod.Name, one.Rule)
	}
	if e.Admin {
		text += ": with the SVIDs that they hold they are admins until those end; choose an ID that no pod ever had, or revoke it with issuedBefore first"
	}
	p.warn(e, "%s", text)
}
