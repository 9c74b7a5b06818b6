package nearmiss

import (
	"testing"

	"github.com/signet-id/signet/spiffe"
)

func selectors(t testing.TB, texts ...string) []spiffe.Selector {
	t.Helper()
	var out []spiffe.Selector
	for _, s := range texts {
		sel, err := spiffe.ParseSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, sel)
	}
	return out
}

func TestCompare(t *testing.T) {
	has := selectors(t, "unix:uid:1000", "unix:user:web", "unix:gid:1000", "unix:group:web", "unix:supplementary_gid:27", "unix:supplementary_group:sudo",
		"unix:path:/usr/bin/web-server", "unix:sha256:aa11", "k8s:ns:prod", "k8s:sa:web", "k8s:pod-label:app:web", "k8s:pod-label:tier:front",
		"k8s:container-image:docker.io/library/web:1.2", "k8s:container-image:docker.io/library/web@sha256:0a0b")
	subject := NewSubject(has, []string{"unix", "k8s"}, Host{SamePath: func(a, b string) bool { return a == "/opt/web" && b == "/usr/bin/web-server" }})
	for _, tt := range []struct {
		name string
		want string
		kind Kind // empty: it holds
		have string
	}{
		{"holds", "unix:uid:1000", "", ""},
		{"typing error in a path", "unix:path:/usr/bin/web-sevrer", Typo, "unix:path:/usr/bin/web-server"},
		{"typing error and an old directory", "unix:path:/bin/web-servr", Typo, "unix:path:/usr/bin/web-server"},
		{"the directory before usr was merged", "unix:path:/bin/web-server", PathAlias, "unix:path:/usr/bin/web-server"},
		{"a symbolic link", "unix:path:/opt/web", PathAlias, "unix:path:/usr/bin/web-server"},
		{"another program", "unix:path:/usr/sbin/nginx", Value, "unix:path:/usr/bin/web-server"},
		{"upper case", "k8s:ns:Prod", Case, "k8s:ns:prod"},
		{"a slash too many", "unix:path:/usr/bin/web-server/", Space, "unix:path:/usr/bin/web-server"},
		{"another user", "unix:uid:1001", Value, "unix:uid:1000"},
		{"a user's name as a number", "unix:uid:web", NameForNumber, "unix:user:web"},
		{"a user's number as a name", "unix:user:1000", NameForNumber, "unix:uid:1000"},
		{"a supplementary group", "unix:gid:27", Supplementary, "unix:supplementary_gid:27"},
		{"a group it is not in", "unix:supplementary_group:docker", Value, "unix:supplementary_group:sudo"},
		{"another build", "unix:sha256:bb22", Hash, "unix:sha256:aa11"},
		{"another label's value", "k8s:pod-label:app:shop", Value, "k8s:pod-label:app:web"},
		{"a typing error in a label's name", "k8s:pod-label:ap:web", Typo, "k8s:pod-label:app:web"},
		{"no such label", "k8s:pod-label:team:web", Absent, ""},
		{"an image without its registry", "k8s:container-image:web:1.2", ImageForm, "k8s:container-image:docker.io/library/web:1.2"},
		{"an image of another tag", "k8s:container-image:docker.io/library/web:1.3", ImageForm, "k8s:container-image:docker.io/library/web:1.2"},
		{"another image", "k8s:container-image:docker.io/library/shop:1.2", Value, ""},
		{"a type that nobody attests", "docker:label:app:web", TypeAbsent, ""},
		{"a kind that the process has not", "k8s:node-name:n1", Absent, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := subject.Compare(selectors(t, tt.want))
			if tt.kind == "" {
				if r.Cost != 0 || r.Held != 1 || len(r.Differences) != 0 {
					t.Errorf("Compare(%q) = %+v, want that it holds", tt.want, r)
				}
				return
			}
			if len(r.Differences) != 1 || r.Differences[0].Kind != tt.kind {
				t.Fatalf("Compare(%q) = %+v, want one difference of kind %q", tt.want, r, tt.kind)
			}
			if have := r.Differences[0].Have; tt.have != "" && (len(have) == 0 || have[0].String() != tt.have) {
				t.Errorf("Compare(%q): in its place %v, want %q first", tt.want, have, tt.have)
			}
		})
	}
	two := subject.Compare(selectors(t, "unix:uid:1000", "unix:uid:1001"))
	if two.Held != 1 || len(two.Differences) != 1 || two.Differences[0].Kind != Contradiction {
		t.Errorf("two users at once: %+v, want a contradiction", two)
	}
	near, far := subject.Compare(selectors(t, "unix:uid:1000", "unix:path:/usr/bin/web-sever")), subject.Compare(selectors(t, "unix:uid:7", "k8s:ns:x"))
	if near.Order(far) >= 0 || !near.Near() || far.Near() {
		t.Errorf("order: %+v and %+v", near, far)
	}
}

// FuzzCompare: what is compared with itself holds, distances are symmetric, and nothing takes long or panics.
func FuzzCompare(f *testing.F) {
	f.Add("unix:path:/usr/bin/web", "unix:path:/bin/web ")
	f.Add("k8s:pod-label:a:b", "k8s:pod-label:b:a")
	f.Add("k8s:container-image:docker.io/library/x:1@sha256:2", "k8s:container-image:x")
	f.Add("a:\x00\xff:", "a:é")
	f.Fuzz(func(t *testing.T, a, b string) {
		x, err := spiffe.ParseSelector(a)
		y, err2 := spiffe.ParseSelector(b)
		if err != nil || err2 != nil {
			return
		}
		s := NewSubject([]spiffe.Selector{x}, []string{x.Type}, Host{})
		if r := s.Compare([]spiffe.Selector{x}); r.Cost != 0 || r.Held != 1 {
			t.Errorf("%q compared with itself: %+v", a, r)
		}
		r := s.Compare([]spiffe.Selector{y})
		if (r.Cost == 0) != (x == y) {
			t.Errorf("%q and %q: %+v", a, b, r)
		}
		if len(a) <= maxTyped && len(b) <= maxTyped && distance(a, b) != distance(b, a) {
			t.Errorf("the distance of %q and %q depends on their order", a, b)
		}
	})
}
