package spireresources

import (
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func sample() *templateData {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web-1", UID: "u-1", Labels: map[string]string{"app": "web", "tier": "front"}, Annotations: map[string]string{"a/b": "x y"}},
		Spec: corev1.PodSpec{ServiceAccountName: "web", NodeName: "n1", Containers: []corev1.Container{{Name: "main", Image: "img"}, {Name: "side"}}}}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", UID: "nu-1", Labels: map[string]string{"zone": "z1"}}, Spec: corev1.NodeSpec{PodCIDR: "10.0.0.0/24"}}
	return &templateData{TrustDomain: "example.org", ClusterName: "prod", ClusterDomain: "cluster.local", PodMeta: &pod.ObjectMeta, PodSpec: &pod.Spec, NodeMeta: &node.ObjectMeta, NodeSpec: &node.Spec}
}

func TestTemplates(t *testing.T) {
	for in, want := range map[string]string{
		"spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}":                                     "spiffe://example.org/ns/shop/sa/web",
		"{{ .ClusterName }}.{{ .ClusterDomain }}":                                                                                          "prod.cluster.local",
		"{{ .PodMeta.Labels.app }}/{{ index .PodMeta.Labels \"tier\" }}/{{ .PodMeta.Labels.none }}|":                                       "web/front/<no value>|",
		"{{ .NodeMeta.Name }}-{{ .NodeMeta.UID }}-{{ .NodeSpec.PodCIDR }}":                                                                 "n1-nu-1-10.0.0.0/24",
		"{{ with .PodMeta.Labels.app }}{{ . }}{{ else }}none{{ end }}":                                                                     "web",
		"{{ if eq .PodMeta.Namespace \"shop\" }}yes{{ else }}no{{ end }}":                                                                  "yes",
		"{{ range $i, $c := .PodSpec.Containers }}{{ if $i }},{{ end }}{{ $c.Name }}{{ end }}":                                             "main,side",
		"{{ printf \"%s-%05d-%q\" .PodMeta.Name (len .PodSpec.Containers) .PodMeta.UID }}":                                                 "web-1-00002-\"u-1\"",
		"{{ urlquery (index .PodMeta.Annotations \"a/b\") }}":                                                                              "x+y",
		"{{ define \"x\" }}[{{ . }}]{{ end }}{{ template \"x\" .PodMeta.Name }}{{ template \"x\" 2 }}":                                     "[web-1][2]",
		"{{ .PodMeta.GetName }} {{ .PodMeta.GetNamespace }}":                                                                               "web-1 shop",
		"{{ $x := .PodMeta.Name }}{{ $x = print $x \"!\" }}{{ $x }}":                                                                       "web-1!",
		"{{ (index .PodSpec.Containers 1).Name }}{{- /* nothing */ -}}  {{ slice .PodMeta.Name 0 3 }}":                                     "sideweb",
		"{{ range $k, $v := .PodMeta.Labels }}{{ $k }}={{ $v }};{{ end }}{{ range 3 }}{{ . }}{{ if eq . 1 }}{{ break }}{{ end }}{{ end }}": "app=web;tier=front;01",
	} {
		b, err := parseTemplate("t", in)
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		for range 2 { // the bounds are those of one run
			if got, err := b.execute(sample()); err != nil || got != want {
				t.Errorf("%q is %q, %v; want %q", in, got, err, want)
			}
		}
	}
}

func TestTemplatesThatAreRefused(t *testing.T) {
	for in, want := range map[string]string{
		"{{":                          "unclosed action",
		"{{ nothing }}":               "not defined",
		"{{ signet_step 1 }}":         "not defined",
		"{{ env \"HOME\" }}":          "not defined",
		strings.Repeat("x", 16<<10+1): "16385 bytes",
		"{{ define \"a\" }}{{ template \"b\" }}{{ end }}{{ define \"b\" }}{{ template \"a\" }}{{ end }}": "calls itself",
		"{{ template \"t\" . }}":                                                                         "calls itself",
		"{{ .PodMeta.Unmarshal .NodeMeta.Marshal }}":                                                     "cannot be called",
		"{{ $x := .PodSpec }}{{ $x.DeepCopy }}":                                                          "cannot be called",
		"{{ (index .PodSpec.Containers 0).Unmarshal .X }}":                                               "cannot be called",
		"{{ .PodMeta.CreationTimestamp.UnmarshalQueryParameter \"x\" }}":                                 "cannot be called",
		"{{ range .PodSpec.Containers }}{{ with . }}{{ if .Size }}{{ end }}{{ end }}{{ else }}{{ end }}": "cannot be called",
		"{{ .PodSpec.String }}":                                                                          "cannot be called",
	} {
		if _, err := parseTemplate("t", in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80q: %v, want %q", in, err, want)
		}
	}
}

// Templates that loop or explode end by a count, not by time.
func TestTemplatesAreBounded(t *testing.T) {
	double := "{{ $x := \"0123456789\" }}" + strings.Repeat("{{ $x = print $x $x }}", 60)
	var deep strings.Builder // each calls the next twice
	for i := range 25 {
		deep.WriteString("{{ define \"" + string(rune('A'+i)) + "\" }}{{ template \"" + string(rune('A'+i+1)) + "\" }}{{ template \"" + string(rune('A'+i+1)) + "\" }}{{ end }}")
	}
	deep.WriteString("{{ define \"" + string(rune('A'+25)) + "\" }}{{ end }}{{ template \"A\" }}")
	for in, want := range map[string]error{
		"{{ range 1000000000000 }}{{ end }}":                                                   errWork,
		"{{ range $i := 1000000000000 }}{{ if $i }}{{ else }}{{ end }}{{ continue }}{{ end }}": errWork,
		"{{ range 100000 }}{{ range 100000 }}{{ $x := .  }}{{ end }}{{ end }}":                 errWork,
		"{{ range 100000000 }}x{{ end }}":                                                      errResult,
		strings.Repeat("x", 8<<10+1):                                                           errResult,
		double:                                                                                 errValue,
		"{{ range 1000000 }}{{ $x := printf \"%1024d\" . }}{{ end }}":                          errWork,
		"{{ range 1000000 }}{{ $x := js \"<<<<<<<<<<<<<<<<<<<<<<<<<<<<\" }}{{ end }}":          errWork,
		deep.String(): errWork,
	} {
		b, err := parseTemplate("t", in)
		if err != nil {
			t.Errorf("%.60q: %v", in, err)
			continue
		}
		if got, err := b.execute(sample()); !errors.Is(err, want) {
			t.Errorf("%.60q: %.60q, %v; want %v", in, got, err, want)
		}
	}
	for in, want := range map[string]string{"{{ printf \"%100000000d\" 1 }}": "width", "{{ printf \"%.*f\" 1000000 1.5 }}": "argument", "{{ printf \"%[2]*[1]d\" 1 1000000 }}": "argument", "{{ printf \"" + strings.Repeat("%s", 300) + "\" }}": "256 verbs", "{{ printf \"%1.999999f\" 1.0 }}": "width"} {
		b, err := parseTemplate("t", in)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.execute(sample()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", in, err, want)
		}
	}
}

// FuzzTemplates: whatever the template, it ends, within bounds, says the same again, and changes nothing.
func FuzzTemplates(f *testing.F) {
	for _, in := range []string{"spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}", "{{ range 1000000000 }}{{ . }}{{ end }}", "{{ define \"a\" }}{{ . }}{{ end }}{{ template \"a\" .PodMeta }}",
		"{{ printf \"%999d%s\" 1 .PodSpec }}", "{{ $x := 1 }}{{ range .PodSpec.Containers }}{{ $x = print $x $x }}{{ end }}{{ $x }}", "{{ block \"b\" . }}{{ html .PodMeta.Labels }}{{ end }}", "{{ with $x := index .PodMeta.Labels \"app\" }}{{ $x | printf \"%q\" | js }}{{ end }}"} {
		f.Add(in)
	}
	f.Fuzz(func(t *testing.T, in string) {
		b, err := parseTemplate("t", in)
		if err != nil {
			return
		}
		data := sample()
		one, err1 := b.execute(data)
		two, err2 := b.execute(data)
		if one != two || (err1 == nil) != (err2 == nil) {
			t.Errorf("%q is once %q, %v and then %q, %v", in, one, err1, two, err2)
		}
		if len(one) > maxResultBytes || b.work < -maxValueBytes {
			t.Errorf("%q made %d bytes with %d left", in, len(one), b.work)
		}
		if !equality.Semantic.DeepEqual(data, sample()) {
			t.Errorf("%q changed what it was shown", in)
		}
	})
}

// A method that shares its name with a field can be called. None of those may be one that writes or is slow.
func TestMethodsThatAreNamedAsFields(t *testing.T) {
	refused := unsafeMethods()
	for _, name := range []string{"Unmarshal", "Marshal", "MarshalTo", "MarshalJSON", "UnmarshalJSON", "MarshalToSizedBuffer", "DeepCopy", "DeepCopyInto", "Size", "String", "SetLabels", "SetName", "Sub", "AsDec", "Set", "RoundUp", "UnmarshalQueryParameter", "UnmarshalText", "GobDecode", "Reset"} {
		if !refused[name] {
			t.Errorf("%s can be called", name)
		}
	}
}
