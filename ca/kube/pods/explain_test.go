package pods

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/signet-id/signet/ca/registry"
)

// verdicts writes an explanation in lines.
func verdicts(e *Explanation) string {
	var lines []string
	for _, v := range e.Verdicts {
		line := v.Rule
		switch {
		case v.Entry != nil:
			line += " gives " + v.Entry.SPIFFEID.Path()
		case v.Refused != "":
			line += " refuses: " + v.Refused
		case v.Ended:
			line += " has ended"
		}
		for _, d := range v.Differences {
			line += fmt.Sprintf(" wants %s (%s %s)", d.Want, d.Kind, strings.Join(d.Have, " "))
		}
		lines = append(lines, line)
	}
	if e.More > 0 {
		lines = append(lines, fmt.Sprintf("%d more", e.More))
	}
	return strings.Join(lines, "\n")
}

// TestExplain has a row for each thing that can keep a template from a pod.
func TestExplain(t *testing.T) {
	web := func() *Pod {
		p := pod("1", "node-a", "shop", "web")
		p.Labels, p.NamespaceLabels = map[string]string{"app": "front", "tier": "a b"}, map[string]string{"team": "blue"}
		p.Owners = []Owner{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web-7d4b9", Controller: true}}
		return p
	}
	for _, tt := range []struct {
		name, documents string
		change          func(*Pod)
		want            string
	}{
		{name: "nothing is applied"},
		{name: "given", documents: "match: [k8s:ns:shop, k8s:pod-label:app:front, unix:uid:7]", want: "Identity t gives /t/web"},
		{name: "another namespace", documents: "match: [k8s:ns:bank, k8s:sa:web]", want: "Identity t wants k8s:ns:bank (value k8s:ns:shop)"},
		{name: "a typing error in the namespace", documents: "match: [k8s:ns:shpo]", want: "Identity t wants k8s:ns:shpo (typo k8s:ns:shop)"},
		{name: "another service account", documents: "match: [k8s:sa:database]", want: "Identity t wants k8s:sa:database (value k8s:sa:web)"},
		{name: "upper case", documents: "match: [k8s:sa:Web]", want: "Identity t wants k8s:sa:Web (case k8s:sa:web)"},
		{name: "another label", documents: "match: ['k8s:pod-label:app:backend']", want: "Identity t wants k8s:pod-label:app:backend (value k8s:pod-label:app:front)"},
		{name: "no such label", documents: "match: ['k8s:pod-label:zone:z']", want: "Identity t wants k8s:pod-label:zone:z (absent )"},
		{name: "a label of the namespace", documents: "match: ['k8s:ns-label:team:green']", want: "Identity t wants k8s:ns-label:team:green (value k8s:ns-label:team:blue)"},
		{name: "another owner", documents: "match: ['k8s:pod-owner:Job:web']", want: "Identity t wants k8s:pod-owner:Job:web (absent )"},
		{name: "an owner of another name", documents: "match: ['k8s:pod-owner:ReplicaSet:payments']", want: "Identity t wants k8s:pod-owner:ReplicaSet:payments (value k8s:pod-owner:ReplicaSet:web-7d4b9)"},
		{name: "another cluster", documents: "on: ['k8s_psat:cluster:test']", want: "Identity t wants k8s_psat:cluster:test (value k8s_psat:cluster:prod)"},
		{name: "ended", documents: "match: [k8s:ns:shop]\nexpiresAt: '2020-01-01T00:00:00Z'", want: "Identity t has ended"},
		{name: "ended, and for others", documents: "match: [k8s:ns:bank]\nexpiresAt: '2020-01-01T00:00:00Z'"},
		{name: "several at once", documents: "match: [k8s:ns:bank, k8s:sa:wbe]\non: ['k8s_psat:cluster:test']",
			want: "Identity t wants k8s:ns:bank (value k8s:ns:shop) wants k8s:sa:wbe (typo k8s:sa:web) wants k8s_psat:cluster:test (value k8s_psat:cluster:prod)"},
		{name: "refused", documents: "match: [k8s:ns:shop]\ndnsNames: ['{{ .k8s.label[\"tier\"] }}.internal']", want: `Identity t refuses: dnsNames: .k8s.label["tier"] is "a b", which is no label of a DNS name: it may hold A-Z a-z 0-9 - _ only`},
		{name: "its ID is registered", documents: "match: [k8s:ns:shop]\n---\nkind: Identity\nname: plain\nspiffeID: /t/web\nmatch: [unix:uid:1]", want: "Identity t refuses: spiffe://example.org/t/web is the SPIFFE ID of Identity plain"},
		{name: "its ID is an older template's", documents: "match: [k8s:ns:shop]\n---\nkind: Identity\nname: other\nspiffeID: /t/{{ .k8s.sa }}\nmatch: [k8s:sa:web]",
			want: "Identity other gives /t/web\nIdentity t refuses: spiffe://example.org/t/web is the SPIFFE ID of Identity other"},
		{name: "two, of which one comes nearer", documents: "match: [k8s:ns:bank, k8s:sa:x]\n---\nkind: Identity\nname: near\nspiffeID: /n/{{ .k8s.sa }}\nmatch: [k8s:ns:shop, k8s:sa:wbe]",
			want: "Identity near wants k8s:sa:wbe (typo k8s:sa:web)\nIdentity t wants k8s:ns:bank (value k8s:ns:shop) wants k8s:sa:x (value k8s:sa:web)"},
		{name: "a static pod is compared with nothing", documents: "match: [k8s:ns:bank]", change: func(p *Pod) { p.Mirror = true }},
		{name: "nor one without a node", documents: "match: [k8s:ns:bank]", change: func(p *Pod) { p.NodeUID = "" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRegistry(t)
			if tt.documents != "" {
				apply(t, r, "kind: Identity\nname: t\nspiffeID: /t/{{ .k8s.sa }}\n"+tt.documents+"\n")
			}
			x := New(Config{Registry: r})
			p := web()
			if tt.change != nil {
				tt.change(p)
			}
			x.Update("prod", []*Pod{p}, nil)
			e, err := x.Explain(t.Context(), "prod", "1")
			if err != nil {
				t.Fatal(err)
			}
			if got := verdicts(e); got != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
			if e.Pod != p {
				t.Errorf("it is about %v", e.Pod)
			}
		})
	}
}

// TestExplainIsBounded: of many rules few are shown, the nearest in front, and who waits no longer is not answered.
func TestExplainIsBounded(t *testing.T) {
	r := newRegistry(t)
	x := New(Config{Registry: r})
	var rules []Rule
	for i := range 300 {
		rules = append(rules, &rule{name: fmt.Sprintf("Identity g%03d", i), revision: 1, path: func(*Pod) (string, error) { return fmt.Sprintf("/g/%d", i), nil }})
		rules = append(rules, &differing{rule{name: fmt.Sprintf("Identity d%03d", i), ns: "nowhere"}, 300 - i})
	}
	x.SetRules(OriginIdentities, rules)
	x.Update("prod", []*Pod{pod("1", "node-a", "shop", "web")}, nil)
	e, err := x.Explain(t.Context(), "prod", "1")
	if err != nil {
		t.Fatal(err)
	}
	var near []string
	for _, v := range e.Verdicts[maxGiven:] {
		near = append(near, fmt.Sprint(len(v.Differences)))
	}
	if len(e.Verdicts) != maxGiven+maxNear || strings.Join(near, " ") != "1 2 3 4 5 6 7 8 9 10" || e.More != 600-maxGiven-maxNear {
		t.Errorf("%d verdicts, the nearest with %v differences, %d more", len(e.Verdicts), near, e.More)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := x.Explain(ctx, "prod", "1"); !errors.Is(err, context.Canceled) {
		t.Errorf("who has gone gets %v", err)
	}
	if e, err := x.Explain(t.Context(), "prod", "2"); e != nil || err != nil {
		t.Errorf("a pod that is not known: %v, %v", e, err)
	}
	if got := x.Find("prod", "shop", "pod-1"); len(got) != 1 || got[0] != "1" {
		t.Errorf("by name: %v", got)
	}
	if got := append(x.Find("test", "shop", "pod-1"), x.Find("prod", "bank", "pod-1")...); len(got) != 0 {
		t.Errorf("of another cluster, or namespace: %v", got)
	}
}

// differing is a rule that differs from every pod in so many things.
type differing struct {
	rule
	n int
}

func (d *differing) Differences(*Subject) []Difference {
	out := make([]Difference, d.n)
	for i := range out {
		out[i] = Difference{Want: "x", Kind: "value"}
	}
	return out
}

// TestCounts: what is given and what is refused, by whatever reason, is counted once for each pod.
func TestCounts(t *testing.T) {
	r := newRegistry(t)
	apply(t, r, byServiceAccount+"---\nkind: Identity\nname: by-label\nspiffeID: /app/{{ .k8s.label[\"app\"] }}\n---\nkind: Identity\nname: taken\nspiffeID: /app/taken\nmatch: [unix:uid:1]\n")
	x := New(Config{Registry: r})
	labelled := func(uid, app string) *Pod {
		p := pod(uid, "node-a", "shop", "web"+uid)
		if app != "" {
			p.Labels = map[string]string{"app": app}
		}
		return p
	}
	x.Update("prod", []*Pod{labelled("1", "a"), labelled("2", "b"), labelled("3", ""), labelled("4", "taken"), labelled("5", "a/b")}, nil)
	got := x.Counts(OriginIdentities)
	if len(got) != 2 || got[registry.RuleName("cluster-default")] != (Count{5, 0}) || got[registry.RuleName("by-label")] != (Count{2, 3}) {
		t.Errorf("counts %v", got)
	}
	x.Update("prod", nil, []string{"1", "3"})
	if got := x.Counts(OriginIdentities); got[registry.RuleName("by-label")] != (Count{1, 2}) {
		t.Errorf("counts after two are gone %v", got)
	}
	if got := x.Counts("spire:prod"); len(got) != 0 {
		t.Errorf("counts of another origin %v", got)
	}
}
