package template

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var web = &Pod{Cluster: "prod", Node: "node-3", Namespace: "shop", ServiceAccount: "web", Name: "web-7d4b9-x2",
	Labels:          map[string]string{"app.kubernetes.io/name": "front", "empty": "", "slash": "a/b", "dots": "..", "dotted": "a.b"},
	NamespaceLabels: map[string]string{"team": "blue"},
	Owners:          []Owner{{Kind: "Other", Name: "o"}, {APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web-7d4b9", Controller: true}}}

func TestPaths(t *testing.T) {
	for _, tt := range []struct{ in, want, wantErr string }{
		{in: "/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}", want: "/ns/shop/sa/web"},
		{in: "/ns/{{.k8s.ns}}/pod/{{\t.k8s.pod }}", want: "/ns/shop/pod/web-7d4b9-x2"},
		{in: "/c/{{ .k8s.cluster }}/{{ .k8s.node }}", want: "/c/prod/node-3"},
		{in: `/app/{{ .k8s.label["app.kubernetes.io/name"] }}`, want: "/app/front"},
		{in: `/team/{{ .k8s.nsLabel["team"] }}/x-{{ .k8s.sa }}-y`, want: "/team/blue/x-web-y"},
		{in: "/o/{{ .k8s.owner.kind }}/{{ .k8s.owner.name }}", want: "/o/ReplicaSet/web-7d4b9"},
		{in: "/fixed", want: "/fixed"},
		{in: `/app/{{ .k8s.label["absent"] }}`, wantErr: `.k8s.label["absent"] is empty`},
		{in: `/app/{{ .k8s.label["empty"] }}`, wantErr: "is empty"},
		{in: `/app/{{ .k8s.label["slash"] }}`, wantErr: `"a/b", which cannot be in a SPIFFE ID`},
		{in: `/app/{{ .k8s.label["dots"] }}`, wantErr: "a path segment is . or .."},
	} {
		p, err := ParsePath(tt.in)
		if err != nil {
			t.Errorf("ParsePath(%q): %v", tt.in, err)
			continue
		}
		got, err := p.Expand(web)
		if got != tt.want || (err == nil) != (tt.wantErr == "") || err != nil && !strings.Contains(err.Error(), tt.wantErr) {
			t.Errorf("%q of a pod is %q, %v; want %q, %q", tt.in, got, err, tt.want, tt.wantErr)
		}
	}
}

func TestOwners(t *testing.T) {
	p, err := ParsePath("/o/{{ .k8s.owner.name }}")
	if err != nil {
		t.Fatal(err)
	}
	for want, owners := range map[string][]Owner{
		"the pod has no controller":            {{Kind: "Job", Name: "a"}},
		"the pod has more than one controller": {{Kind: "Job", Name: "a", Controller: true}, {Kind: "Job", Name: "b", Controller: true}},
	} {
		if got, err := p.Expand(&Pod{Owners: owners}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("owners %v: %q, %v; want %q", owners, got, err, want)
		}
	}
}

func TestPathsThatAreRefused(t *testing.T) {
	for _, tt := range []struct {
		in     string
		offset int
		want   string
	}{
		{"ns/{{ .k8s.ns }}", 0, "begins with /"},
		{"/{{ .k8s.ns }}", 1, "first path segment must be fixed"},
		{"/x{{ .k8s.ns }}/a", 2, "first path segment must be fixed"},
		{"/ns/{{ .k8s.ns }}{{ .k8s.sa }}", 17, "one path segment"},
		{"/ns/{{ .k8s.ns }}-{{ .k8s.sa }}", 18, "one path segment"},
		{"/ns/{{ .k8s.nss }}", 7, "no variable .k8s.nss"},
		{"/ns/{{ .Pod.Name }}", 7, "begins with .k8s."},
		{"/ns/{{ .k8s.ns | lower }}", 15, "expected }}"},
		{"/ns/{{ .k8s.ns", 14, "expected }}"},
		{"/ns/x}}", 5, "}} without {{"},
		{"/ns/{{ .k8s.label }}", 17, "needs the key"},
		{`/ns/{{ .k8s.label["a b"] }}`, 19, "no key of a label"},
		{`/ns/{{ .k8s.label["a"}}`, 19, `ends with "]`},
		{"/ns/{{ .k8s.ns }}/", 0, "segment is empty"},
		{"/ns//{{ .k8s.ns }}", 0, "segment is empty"},
		{"/ns/../{{ .k8s.ns }}", 0, ". or .."},
		{"/spire/{{ .k8s.ns }}", 1, "reserved"},
		{"/ns/ä/{{ .k8s.ns }}", 4, "may hold"},
		{"/" + strings.Repeat("a", MaxBytes), MaxBytes, "at most"},
	} {
		_, err := ParsePath(tt.in)
		s, ok := errors.AsType[*SyntaxError](err)
		if !ok || s.Offset != tt.offset || !strings.Contains(s.Problem, tt.want) {
			t.Errorf("ParsePath(%q): %+v; want offset %d and %q", tt.in, err, tt.offset, tt.want)
		}
	}
}

func TestDNSNames(t *testing.T) {
	for _, tt := range []struct{ in, want, wantErr string }{
		{in: "{{ .k8s.sa }}.{{ .k8s.ns }}.svc", want: "web.shop.svc"},
		{in: "plain.internal", want: "plain.internal"},
		{in: `x-{{ .k8s.label["dotted"] }}.internal`, wantErr: "no label of a DNS name"},
		{in: "{{ .k8s.sa }}", wantErr: "last label"},
		{in: "a.{{ .k8s.sa }}", wantErr: "last label"},
		{in: "a.{{ .k8s.sa }}-x", wantErr: "last label"},
		{in: "{{ .k8s.sa }}-{{ .k8s.ns }}.svc", wantErr: "one label"},
	} {
		got := ""
		d, err := ParseDNSName(tt.in)
		if err == nil {
			got, err = d.Expand(web)
		}
		if got != tt.want || (err == nil) != (tt.wantErr == "") || err != nil && !strings.Contains(err.Error(), tt.wantErr) {
			t.Errorf("%q of a pod is %q, %v; want %q, %q", tt.in, got, err, tt.want, tt.wantErr)
		}
	}
}

func TestMatches(t *testing.T) {
	for in, want := range map[string]bool{
		"ns:shop": true, "ns:web": false, "sa:web": true, "pod-name:web-7d4b9-x2": true, "node-name:node-3": true,
		"pod-label:app.kubernetes.io/name:front": true, "pod-label:empty:": true, "pod-label:absent:": false,
		"ns-label:team:blue": true, "ns-label:team:red": false, "pod-owner:ReplicaSet:web-7d4b9": true, "pod-owner:Other:web-7d4b9": false,
	} {
		if m, ok := ParseMatch(in); !ok || m.Holds(web) != want {
			t.Errorf("%q: known %t, holds %t; want %t", in, ok, m.Holds(web), want)
		}
	}
	for _, in := range []string{"container-name:x", "pod-image:x", "pod-uid:x", "ns", "pod-label:app"} {
		if m, ok := ParseMatch(in); ok {
			t.Errorf("%q is judged by the CA: %+v", in, m)
		}
	}
}

// FuzzPath: what parses prints back as it was read, and whatever a pod's values are, what comes out is a path of as many
// segments as the template has, which go-spiffe accepts.
func FuzzPath(f *testing.F) {
	for _, s := range []string{"/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}", `/app/{{ .k8s.label["app"] }}`, "/x/a{{.k8s.owner.name}}b", "/{{", "/a/{{ .k8s.node }}/.{{ .k8s.pod }}"} {
		f.Add(s, "shop", "web", "..", "/")
	}
	f.Fuzz(func(t *testing.T, text, ns, sa, label, other string) {
		p, err := ParsePath(text)
		if err != nil {
			if s, ok := errors.AsType[*SyntaxError](err); !ok || s.Offset < 0 || s.Offset > len(text) {
				t.Fatalf("error %+v", err)
			}
			return
		}
		if again, err := ParsePath(p.String()); err != nil || again.String() != text {
			t.Fatalf("%q reads as %q, %v", text, again, err)
		}
		path, err := p.Expand(&Pod{Cluster: other, Node: label, Namespace: ns, ServiceAccount: sa, Name: other, Labels: map[string]string{"app": label, ns: other}, NamespaceLabels: map[string]string{"app": other},
			Owners: []Owner{{Kind: other, Name: label, Controller: true}}})
		if err != nil {
			return
		}
		if strings.Count(path, "/") != strings.Count(p.Sample(), "/") {
			t.Errorf("%q became %q, with other segments", text, path)
		}
		if _, err := spiffeid.FromPath(spiffeid.RequireTrustDomainFromString("example.org"), path); err != nil {
			t.Errorf("%q became %q: %v", text, path, err)
		}
		if first := strings.SplitN(path, "/", 3)[1]; first == "spire" || !strings.HasPrefix(text, "/"+first) {
			t.Errorf("%q became %q", text, path)
		}
	})
}

// FuzzDNSName: no value adds a label.
func FuzzDNSName(f *testing.F) {
	f.Add("{{ .k8s.sa }}.{{ .k8s.ns }}.svc", "web", "shop")
	f.Add("a.{{ .k8s.sa }}.b", "x.y", "*")
	f.Fuzz(func(t *testing.T, text, sa, ns string) {
		d, err := ParseDNSName(text)
		if err != nil {
			return
		}
		name, err := d.Expand(&Pod{ServiceAccount: sa, Namespace: ns, Name: sa, Node: ns, Cluster: sa})
		if err == nil && strings.Count(name, ".") != strings.Count(d.Sample(), ".") {
			t.Errorf("%q became %q", text, name)
		}
	})
}

func TestSegments(t *testing.T) {
	for text, want := range map[string][]Segment{
		"/a":                   {{Text: "a"}},
		"/ns/{{ .k8s.ns }}":    {{Text: "ns"}, {Variable: "ns"}},
		"/a/x-{{.k8s.sa}}-y/b": {{Text: "a"}, {"x--y", "sa"}, {Text: "b"}},
		`/a/{{ .k8s.label["app.kubernetes.io/name"] }}/{{ .k8s.ns }}`: {{Text: "a"}, {Variable: "label"}, {Variable: "ns"}},
		"/a/{{ .k8s.owner.kind }}/{{ .k8s.cluster }}.b":               {{Text: "a"}, {Variable: "owner.kind"}, {".b", "cluster"}},
	} {
		p, err := ParsePath(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Segments(); !slices.Equal(got, want) {
			t.Errorf("%s: %+v, want %+v", text, got, want)
		}
	}
}
