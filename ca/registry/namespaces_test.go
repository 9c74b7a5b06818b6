package registry

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/template"
	"github.com/signet-id/signet/spiffe"
)

// withTemplates puts templated Identities into the index.
func withTemplates(t *testing.T, r *Registry, td string, texts map[string]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, text := range texts {
		text, on, _ := strings.Cut(text, " on ")
		path, err := template.ParsePath(strings.TrimPrefix(text, "spiffe://"+td))
		if err != nil {
			t.Fatal(err)
		}
		e := &Entry{ID: EntryID(identityPrefix + name), Identity: &Document{Name: name}, Template: &Template{Path: path}}
		if on != "" {
			e.On = []spiffe.Selector{sel(on)}
		}
		r.ix.templated[e.ID] = e
		r.ix.noteTemplate(e.ID)
	}
}

const (
	plainTemplate   = "/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}"
	clusterTemplate = "/k/{{ .k8s.cluster }}/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}"
)

func TestANamespaceSpeaksForItsOwnServicesOnly(t *testing.T) {
	one, two := []string{"prod"}, []string{"prod", "stage"}
	for _, tt := range []struct {
		name      string
		templates string // name=text, separated by ;
		clusters  []string
		service   string
		refused   string // part of the message; empty: it is its own
	}{
		{"an ID", plainTemplate, one, "/ns/web/sa/api", ""},
		{"all of a service account", plainTemplate, one, "/ns/web/sa/*", ""},
		{"all of the namespace", plainTemplate, one, "/ns/web/**", ""},
		{"deeper than the template", plainTemplate, one, "/ns/web/sa/api/v1", ""},
		{"the full form", "spiffe://example.org" + plainTemplate, one, "spiffe://example.org/ns/web/sa/api", ""},
		{"spaces in a template", "/ns/{{.k8s.ns}}/sa/{{ .k8s.sa}}", one, "/ns/web/sa/api", ""},
		{"a list", plainTemplate, one, "[/ns/web/sa/a, /ns/web/sa/b]", ""},
		{"the namespace is the last segment", "/ns/{{ .k8s.ns }}", one, "/ns/web", ""},
		{"the cluster in the ID", clusterTemplate, two, "/k/prod/ns/web/sa/api", ""},
		{"the cluster in on", plainTemplate + " on k8s_psat:cluster:prod", two, "/ns/web/sa/api", ""},
		{"each its own template", "/p/{{ .k8s.ns }}/{{ .k8s.sa }} on k8s_psat:cluster:prod;/s/{{ .k8s.ns }}/{{ .k8s.sa }} on k8s_psat:cluster:stage", two, "/p/web/api", ""},

		{"no template", "", one, "/ns/web/sa/api", "no services"},
		{"another namespace", plainTemplate, one, "/ns/bank/sa/api", "below spiffe://example.org/ns/web"},
		{"a name that begins alike", plainTemplate, one, "/ns/web2/sa/api", "below"},
		{"another case", plainTemplate, one, "/ns/Web/sa/api", "below"},
		{"one of two", plainTemplate, one, "[/ns/web/sa/a, /ns/bank/sa/b]", "/ns/bank/sa/b"},
		{"a wildcard for the namespace", plainTemplate, one, "/ns/*/sa/api", "below"},
		{"a wildcard above it", plainTemplate, one, "/ns/**", "below"},
		{"everything", plainTemplate, one, "/**", "below"},
		{"a wildcard for the first segment", plainTemplate, one, "/*/web/sa/api", "below"},
		{"two wildcards", plainTemplate, one, "/*/*/sa/api", "below"},
		{"the prefix itself", plainTemplate, one, "/ns/web", "below"},
		{"above the namespace", plainTemplate, one, "/ns", "below"},
		{"a service outside", plainTemplate, one, "/bank", "below"},
		{"the static part alone", "/ns/web/sa/{{ .k8s.sa }}", one, "/ns/web/sa/api", "no services"},
		{"the namespace behind another variable", "/sa/{{ .k8s.sa }}/{{ .k8s.ns }}", one, "/sa/api/web", "no services"},
		{"the namespace within a segment", "/ns/x-{{ .k8s.ns }}/sa/{{ .k8s.sa }}", one, "/ns/x-web/sa/api", "no services"},
		{"two clusters share it", plainTemplate, two, "/ns/web/sa/api", "{{ .k8s.cluster }}"},
		{"two clusters by two Identities share it", plainTemplate + " on k8s_psat:cluster:prod;" + plainTemplate + " on k8s_psat:cluster:stage", two, "/ns/web/sa/api", `cluster "stage"`},
		{"a template of another cluster", plainTemplate + " on k8s_psat:cluster:stage", two, "/ns/web/sa/api", "no services"},
		{"the other cluster's part", clusterTemplate, two, "/k/stage/ns/web/sa/api", "below"},
		{"a wildcard for the cluster", clusterTemplate, two, "/k/*/ns/web/sa/api", "below"},
		{"all of the cluster", clusterTemplate, one, "/k/prod/**", "below"},
		{"a second template crosses it", plainTemplate + ";/ns/{{ .k8s.sa }}/sa/{{ .k8s.ns }}", one, "/ns/web/sa/api", "other namespaces"},
		{"a second template crosses it by a label whose key has a slash", plainTemplate + `;/ns/{{ .k8s.label["app.kubernetes.io/name"] }}/sa/{{ .k8s.sa }}`, one, "/ns/web/sa/api", "other namespaces"},
		{"a second template crosses the whole of it only", plainTemplate + ";/ns/{{ .k8s.sa }}/x/{{ .k8s.ns }}", one, "/ns/web/sa/api", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := open(t)
			texts := map[string]string{}
			for i, text := range strings.Split(tt.templates, ";") {
				if text != "" {
					texts[string(rune('a'+i))] = text
				}
			}
			withTemplates(t, r, "example.org", texts)
			p, err := planOf(r, "kind: CallPolicy\nname: prod_web_p\nservice: "+tt.service+"\nallow:\n- from: [/anybody]\n",
				Options{Owner: ofProd, Namespaces: map[string]Namespace{"prod_web_p": {Cluster: "prod", Name: "web", Clusters: tt.clusters}}})
			switch {
			case tt.refused == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.refused == "" && !checked(p):
				t.Error("the plan holds if the Identity changes before it is committed")
			case tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused) || !strings.Contains(err.Error(), "test.yaml:3:1")):
				t.Errorf("Plan = %v, want a refusal at test.yaml:3:1 that says %q", err, tt.refused)
			}
		})
	}
}

func checked(p *Plan) bool {
	for _, c := range p.checks {
		if strings.HasPrefix(c.Key, entryPrefix+identityPrefix) {
			return true
		}
	}
	return false
}

// TestANamespaceDoesNotSpeakForWhatWasRegistered: an operator gave an ID below a namespace's segment to something else, before or
// after the namespace was made.
func TestANamespaceDoesNotSpeakForWhatWasRegistered(t *testing.T) {
	for _, tt := range []struct {
		name, service, on string
		selectors         []spiffe.Selector
		clusters          []string
		refused           bool
	}{
		{"the ID itself", "/ns/web/sa/api", "", []spiffe.Selector{sel("unix:uid:1")}, []string{"prod"}, true},
		{"by a pattern", "/ns/web/**", "", []spiffe.Selector{sel("unix:uid:1")}, []string{"prod"}, true},
		{"another ID", "/ns/web/sa/b", "", []spiffe.Selector{sel("unix:uid:1")}, []string{"prod"}, false},
		{"a pattern beside it", "/ns/web/x/*", "", []spiffe.Selector{sel("unix:uid:1")}, []string{"prod"}, false},
		{"of another namespace's pods", "/ns/web/sa/api", "", []spiffe.Selector{sel("k8s:ns:bank")}, []string{"prod"}, true},
		{"of the namespace's own pods", "/ns/web/sa/api", "", []spiffe.Selector{sel("k8s:ns:web"), sel("k8s:sa:x")}, []string{"prod"}, false},
		{"in which cluster is not said", "/ns/web/sa/api", "", []spiffe.Selector{sel("k8s:ns:web")}, []string{"prod", "stage"}, true},
		{"in its cluster", "/ns/web/sa/api", "k8s_psat:cluster:prod", []spiffe.Selector{sel("k8s:ns:web")}, []string{"prod", "stage"}, false},
		{"in another cluster", "/ns/web/sa/api", "k8s_psat:cluster:stage", []spiffe.Selector{sel("k8s:ns:web")}, []string{"prod", "stage"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := open(t)
			apply := func(text string) {
				t.Helper()
				p, err := planOf(r, text, Options{})
				if err == nil {
					_, err = r.Apply(t.Context(), p)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			apply("kind: Identity\nname: t\nspiffeID: " + plainTemplate + "\non: [k8s_psat:cluster:prod]\n")
			plan := func() error {
				_, err := planOf(r, "kind: CallPolicy\nname: prod_web_p\nservice: "+tt.service+"\nallow:\n- from: [/anybody]\n",
					Options{Owner: ofProd, Namespaces: map[string]Namespace{"prod_web_p": {Cluster: "prod", Name: "web", Clusters: tt.clusters}}})
				return err
			}
			if err := plan(); err != nil {
				t.Fatal(err)
			}
			before := r.TemplatesChanged()
			text := "kind: Identity\nname: vault\nspiffeID: /ns/web/sa/api\nmatch:\n"
			for _, s := range tt.selectors {
				text += "- " + s.String() + "\n"
			}
			if tt.on != "" {
				text += "on: [" + tt.on + "]\n"
			}
			apply(text)
			if r.TemplatesChanged() == before {
				t.Error("policies are not judged anew")
			}
			if err := plan(); tt.refused != (err != nil) || err != nil && !strings.Contains(err.Error(), "identity.vault") {
				t.Errorf("Plan = %v", err)
			}
			changed := r.TemplatesChanged()
			apply("kind: Identity\nname: elsewhere\nspiffeID: /vault\nmatch: [unix:uid:1]\n")
			if r.TemplatesChanged() != changed {
				t.Error("what is registered elsewhere has every policy judged anew")
			}
		})
	}
}

// A policy may have ten thousand patterns, and the registry a hundred thousand IDs: these are looked through once, not for each pattern.
func TestManyPatternsOfOneNamespace(t *testing.T) {
	r := open(t)
	node := spiffeid.RequireFromPath(td, "/spire/agent/x509pop/one")
	for _, e := range []*Entry{
		{SPIFFEID: spiffeid.RequireFromPath(td, "/ns/web/sa/own"), ParentID: node, Selectors: []spiffe.Selector{sel("k8s:ns:web")}},
		{SPIFFEID: spiffeid.RequireFromPath(td, "/ns/web/sa/machine"), ParentID: node, Selectors: []spiffe.Selector{sel("unix:uid:1")}},
		{SPIFFEID: spiffeid.RequireFromPath(td, "/ns/web2/sa/machine"), ParentID: node, Selectors: []spiffe.Selector{sel("unix:uid:1")}},
	} {
		if got := r.CreateEntries(t.Context(), []*Entry{e})[0]; got.Err != nil {
			t.Fatal(got.Err)
		}
	}
	ns, below, begin := Namespace{Cluster: "prod", Name: "web", Clusters: []string{"prod"}}, map[string][]*Entry{}, "spiffe://example.org/ns/web"
	r.mu.RLock()
	defer r.mu.RUnlock()
	if e := r.ix.foreign(ns, begin+"/sa/x/*", begin, below); e != nil || len(below[begin]) != 1 {
		t.Errorf("foreign %v, below %v", e, below)
	}
	empty := newIndex() // what was found counts
	for pattern, want := range map[string]string{"/**": "machine", "/sa/*": "machine", "/sb/*": ""} {
		if e := empty.foreign(ns, begin+pattern, begin, below); (e != nil) != (want != "") || e != nil && !strings.HasSuffix(e.SPIFFEID.Path(), want) {
			t.Errorf("%s: %v, want %q", pattern, e, want)
		}
	}
}

// FuzzNamespaces: whatever a policy of a namespace says, what it may speak for is no ID of another namespace or cluster.
func FuzzNamespaces(f *testing.F) {
	for _, s := range []string{"/ns/web/sa/api", "/ns/*/sa/api", "/**", "/ns/web/**", "/k/prod/ns/web/*/a", "/ns/w\u0435b/sa/api", "/ns/web/../bank", "/ns//web"} {
		for _, text := range []string{plainTemplate, clusterTemplate, "/a/{{ .k8s.ns }}", "/k/{{ .k8s.cluster }}/{{ .k8s.ns }}/{{ .k8s.ns }}", `/ns/{{ .k8s.label["a/b"] }}/x`} {
			f.Add(text, s)
		}
	}
	f.Fuzz(func(t *testing.T, text, service string) {
		path, err := template.ParsePath(text)
		if err != nil {
			return
		}
		n := newNamespaceTemplate("i", path)
		clusters := []string{"prod", "stage"}
		ns := Namespace{Cluster: "prod", Name: "web", Clusters: clusters}
		segments := strings.Split(strings.TrimPrefix(service, "/"), "/")
		_, others := n.givesOthers(ns, segments)
		if others || !n.gives(ns, segments) {
			return
		}
		for _, c := range clusters {
			for _, name := range []string{"web", "bank"} {
				if c == "prod" && name == "web" {
					continue
				}
				id := strings.ReplaceAll("/"+strings.Join(n.in(c, name), "/"), "*", "x")
				if patternHas(segments, strings.Split(id[1:], "/")) {
					t.Errorf("template %q: namespace web of prod speaks for %q by %q, which %s of %s has", text, service, id, name, c)
				}
			}
		}
	})
}

// patternHas is what a pattern means, written a second time.
func patternHas(pattern, id []string) bool {
	for i, s := range pattern {
		if s == "**" {
			return len(id) > i
		}
		if i >= len(id) || s != "*" && s != id[i] {
			return false
		}
	}
	return len(pattern) == len(id)
}
