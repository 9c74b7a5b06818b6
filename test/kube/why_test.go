//go:build kube

package kube

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/signet-id/signet/internal/why"
	"github.com/signet-id/signet/test/replicatest"
)

// whySaid is what `signet why` says of one pod, for programs and for people.
type whySaid struct {
	why.Cause
	Status int
	Pod    struct {
		Cluster, Namespace, Name, UID, State, Detail, Node string
		Static                                             bool
		Agents                                             []struct{ ID string }
		Rules                                              []whyRule
	}
	JSON, Text string
}

// A whyRule is what a template makes of the pod.
type whyRule struct {
	Rule, Refused string
	Differences   []struct {
		Selector, Kind string
		Have           []string
	}
}

// atTheCA runs a command in a shell as on the CA's host, where there is no agent: signet and kubectl are what they are there.
func (d *daemonSet) atTheCA(line string) (status int, stdout, stderr string) {
	d.k.t.Helper()
	cmd := exec.CommandContext(d.k.ctx, "sh", "-c", `signet() { `+replicatest.AsSignet+`=1 "$SIGNET" "$@"; }; kubectl() { command "${SIGNET_KUBECTL:-kubectl}" "$@"; }; `+line)
	cmd.Env = append(os.Environ(), "SIGNET="+os.Args[0], "KUBECONFIG="+d.k.kubeconfig, "SIGNET_CA_SOCKET="+d.s.CASocket(), "SIGNET_AGENT_SOCKET="+filepath.Join(filepath.Dir(d.s.CASocket()), "no-agent.sock"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	var exit *exec.ExitError
	switch err := cmd.Run(); {
	case errors.As(err, &exit):
		status = exit.ExitCode()
	case err != nil:
		d.k.t.Fatalf("%s: %v", line, err)
	}
	return status, out.String(), errs.String()
}

// why asks about a pod until the main cause is the one that is wanted: the CA learns a little later than the API server what
// becomes of pods. Both forms of the answer must agree, and name the pod.
func (d *daemonSet) why(pod string, want why.Code) *whySaid {
	k := d.k
	k.t.Helper()
	instead := "" // what it has said last, if that was something else
	defer func() {
		if instead != "" && k.t.Failed() {
			k.t.Logf("signet why %s should say %s; it has said\n%s", pod, want, instead)
		}
	}()
	for {
		status, out, stderr := d.atTheCA("signet why " + pod + " -o json")
		said := &whySaid{Status: status, JSON: out}
		var answer struct {
			CAAsked  bool `json:"ca_asked"`
			Findings []struct {
				Causes []why.Cause
				Pod    json.RawMessage
			}
		}
		if err := json.Unmarshal([]byte(out), &answer); err != nil || !answer.CAAsked || len(answer.Findings) != 1 || len(answer.Findings[0].Causes) == 0 || stderr != "" {
			k.t.Fatalf("signet why %s -o json: status %d, %v: %s%s", pod, status, err, out, stderr)
		}
		said.Cause = answer.Findings[0].Causes[0]
		if err := json.Unmarshal(answer.Findings[0].Pod, &said.Pod); err != nil {
			k.t.Fatalf("signet why %s -o json: %v: %s", pod, err, out)
		}
		if said.Code != want {
			instead = out
			pause(k.t, k.ctx)
			continue
		}
		if named := said.Pod.Namespace + "/" + said.Pod.Name; named != pod || said.Pod.Cluster != "prod" || !strings.Contains(said.Cause.Text, pod) {
			k.t.Errorf("signet why %s -o json names the pod %s:\n%s", pod, named, out)
		}
		if wanted := map[bool]int{true: 0, false: 1}[want == why.Served]; status != wanted || len(answer.Findings[0].Causes) != 1 {
			k.t.Errorf("signet why %s -o json: status %d, want %d and one cause:\n%s", pod, status, wanted, out)
		}
		status, said.Text, stderr = d.atTheCA("signet why " + pod)
		if head, _, _ := strings.Cut(said.Text, "\n"); status != said.Status || stderr != "" || head != string(want)+" "+said.Cause.Text || !strings.Contains(said.Text, "pod "+pod+" of cluster prod") {
			k.t.Errorf("signet why %s: status %d, stderr %q:\n%s\nas JSON:\n%s", pod, status, stderr, said.Text, out)
		}
		for _, line := range said.Fix {
			if !strings.Contains(said.Text, "\n  "+line+"\n") {
				k.t.Errorf("signet why %s does not say %q:\n%s", pod, line, said.Text)
			}
			d.pasted(pod, line)
		}
		return said
	}
}

// pasted runs what is proposed as it stands, which must be something that can be run.
func (d *daemonSet) pasted(pod, line string) {
	d.k.t.Helper()
	if i := strings.LastIndex(line, ": kubectl "); strings.HasPrefix(line, "#") && i >= 0 {
		line = line[i+2:]
	}
	if strings.HasPrefix(line, "#") {
		return
	}
	if status, out, stderr := d.atTheCA(line); status != 0 || out+stderr == "" { // kubectl says of an empty list on stderr that it is
		d.k.t.Errorf("what is proposed for pod %s, %s: status %d, %s%s", pod, line, status, out, stderr)
	}
}

// says wants words in what people read, and a command among what is proposed.
func (w *whySaid) says(t *testing.T, fix string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(w.Text, word) {
			t.Errorf("of pod %s, this is not said: %s\n%s", w.Pod.Name, word, w.Text)
		}
	}
	if fix != "" && !slices.ContainsFunc(w.Fix, func(line string) bool { return strings.Contains(line, fix) }) {
		t.Errorf("for pod %s, this is not proposed: %s\n%s", w.Pod.Name, fix, w.Text)
	}
}

// `signet why NAMESPACE/POD`, asked of the CA alone, names why a pod on a real kubelet gets no identity, and what it proposes can be
// run, and helps.
func TestWhyPod(t *testing.T) {
	ctx := bounded(t)
	k := first(t, ctx)
	d := templated(t, k)
	ns := k.namespace
	match := func(more string) string {
		return fmt.Sprintf("match: ['k8s:ns:%s', 'k8s:sa:web', %s], on: ['k8s_psat:cluster:prod']}\n", ns, more)
	}
	d.s.Apply(`{kind: Identity, name: by-app, spiffeID: '/app/{{ .k8s.label["app"] }}', ` + match("'k8s:pod-label:tier:front'") +
		`---` + "\n" + `{kind: Identity, name: by-zone, spiffeID: '/zone/{{ .k8s.pod }}', dnsNames: ['{{ .k8s.label["zone"] }}.internal'], ` + match("'k8s:pod-label:part:dns', 'k8s:pod-label:zoned:yes'"))
	other := k.space("other")
	k.kubectl("-n", other, "create", "serviceaccount", "web")

	const front = "app: shop, tier: front"
	nobody := "  containers: [{name: main, image: 'signet.test/nobody:1', imagePullPolicy: Never}]\n"
	once := "  restartPolicy: Never\n  containers: [{name: main, IMAGE, command: [/workload, %s]}]\n"
	k.apply(strings.Join([]string{
		d.manifest("back", "app: shop, tier: backend", firstCall),
		d.manifest("bare", "app: shop", firstCall),
		d.manifest("typo", "app: shop, tier: frnot", firstCall),
		d.manifest("nameless", "tier: front", firstCall),
		d.manifest("no-host", "part: dns, zoned: 'yes', zone: a..b", firstCall),
		strings.Replace(d.manifest("default", front, firstCall), "serviceAccountName: web", "serviceAccountName: default", 1),
		d.manifest("succeeds", front, fmt.Sprintf(once, "who, once")),
		d.manifest("fails", front, fmt.Sprintf(once, "nothing-of-the-kind")),
		d.manifest("nowhere", front, "  nodeSelector: {signet.test/nowhere: here}\n"+firstCall),
		d.manifest("not-started", front, nobody),
		strings.Replace(d.manifest("elsewhere", front, firstCall), "namespace: "+ns, "namespace: "+other, 1),
		d.manifest("served", front, firstCall),
	}, "---\n"))
	node := k.kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")
	uid := d.began("served", "/app/shop")

	// Served: by which template, to which agent.
	served := d.why(ns+"/served", why.Served)
	served.says(t, "", "spiffe://example.org/app/shop by Identity by-app", "on node "+node, "service account web", "Identity by-app gives spiffe://example.org/app/shop")
	if p := served.Pod; p.UID != uid || p.State != "known" || p.Node != node || len(p.Agents) != 1 || p.Agents[0].ID != "spiffe://example.org"+d.nodes()[0].Id.Path {
		t.Errorf("a pod that is served:\n%s", served.JSON)
	}
	// So is one whose containers do not start yet.
	d.why(ns+"/not-started", why.Served).says(t, "", "spiffe://example.org/app/shop by Identity by-app")

	// No template matches: the nearest, and what differs.
	const show = "signet get identity by-app -o yaml"
	for _, c := range []struct {
		pod                  string
		code                 why.Code
		selector, kind, have string
	}{
		{ns + "/back", why.LabelDiffers, "k8s:pod-label:tier:front", "value", "k8s:pod-label:tier:backend"},
		{ns + "/bare", why.LabelMissing, "k8s:pod-label:tier:front", "absent", ""},
		{ns + "/typo", why.Typo, "k8s:pod-label:tier:front", "typo", "k8s:pod-label:tier:frnot"},
		{ns + "/default", why.ServiceAccountDiffers, "k8s:sa:web", "value", "k8s:sa:default"},
		{other + "/elsewhere", why.NamespaceDiffers, "k8s:ns:" + ns, "value", "k8s:ns:" + other},
	} {
		said := d.why(c.pod, c.code)
		said.says(t, show, "the nearest is Identity by-app: it wants "+c.selector, "Identity by-app is for other pods", "x "+c.selector+" ("+c.kind)
		namespace, name, _ := strings.Cut(c.pod, "/")
		said.says(t, "kubectl -n "+namespace+" get pod "+name+" -o yaml", c.have)
		if r := said.Pod.Rules; len(r) != 2 || r[0].Rule != "Identity by-app" || len(r[0].Differences) != 1 || r[0].Differences[0].Selector != c.selector || r[0].Differences[0].Kind != c.kind ||
			strings.Join(r[0].Differences[0].Have, " ") != c.have || len(r[1].Differences) < 2 {
			t.Errorf("what the rules want of %s:\n%s", c.pod, said.JSON)
		}
	}
	k.kubectl("-n", ns, "label", "pod", "back", "tier=front", "--overwrite")
	d.why(ns+"/back", why.Served)
	k.untilPrinted(k.uid("back"), "an identity by the label", has("svid: /app/shop "))

	// A template that matches and is refused: with the words of the Event on the pod.
	for pod, want := range map[string][2]string{
		"nameless": {"Identity by-app", `spiffeID: .k8s.label["app"] is empty`},
		"no-host":  {"Identity by-zone", "which is no label of a DNS name"},
	} {
		said := d.why(ns+"/"+pod, why.TemplateRefused)
		i := slices.IndexFunc(said.Pod.Rules, func(r whyRule) bool { return r.Refused != "" })
		if i < 0 || said.Pod.Rules[i].Rule != want[0] || !strings.Contains(said.Pod.Rules[i].Refused, want[1]) {
			t.Errorf("pod %s is refused, and should be by %q:\n%s", pod, want, said.JSON)
			continue
		}
		reason := said.Pod.Rules[i].Refused
		describe := "kubectl -n " + ns + " describe pod " + pod
		said.says(t, describe, want[0]+" is for pod "+ns+"/"+pod, "gives it nothing: "+reason, "x "+want[0]+" refuses: "+reason)
		said.says(t, "signet get identity "+strings.TrimPrefix(want[0], "Identity ")+" -o yaml")
		k.until("there is an Event on pod "+pod, func(out string, err error) bool { return err == nil && out == "no identity by "+want[0]+": "+reason },
			"-n", ns, "get", "events", "--field-selector=reason=IdentityRefused,involvedObject.name="+pod, "-o", "jsonpath={.items[*].message}")
		if _, out, _ := d.atTheCA(describe); !strings.Contains(out, reason) {
			t.Errorf("%s does not show why:\n%s", describe, out)
		}
	}
	k.kubectl("-n", ns, "label", "pod", "nameless", "app=shop")
	d.why(ns+"/nameless", why.Served)

	// Pods that are on no node, or on none any more.
	k.until("the scheduler has tried", func(out string, err error) bool { return err == nil && out != "" }, "-n", ns, "get", "pod", "nowhere", "-o", `jsonpath={.status.conditions[?(@.type=="PodScheduled")].message}`)
	nowhere := d.why(ns+"/nowhere", why.PodNotScheduled)
	nowhere.says(t, "kubectl -n "+ns+" describe pod nowhere", "0/1 nodes are available")
	if nowhere.Pod.State != "unscheduled" || nowhere.Pod.UID != k.uid("nowhere") || nowhere.Pod.Node != "" {
		t.Errorf("a pod that is on no node:\n%s", nowhere.JSON)
	}
	for pod, phase := range map[string]string{"succeeds": "Succeeded", "fails": "Failed"} {
		said := d.why(ns+"/"+pod, why.PodEnded)
		if said.says(t, "", "has ended ("+phase+")"); said.Pod.State != "ended" || said.Pod.Detail != phase || said.Pod.UID != k.uid(pod) {
			t.Errorf("a pod that has ended:\n%s", said.JSON)
		}
	}
	for _, pod := range []string{ns + "/nobody", other + "/served", "no-such-namespace/served"} {
		said := d.why(pod, why.PodUnknown)
		namespace, _, _ := strings.Cut(pod, "/")
		if said.says(t, "kubectl -n "+namespace+" get pods", "the API server has none of that name"); said.Pod.State != "absent" {
			t.Errorf("a pod that there is not:\n%s", said.JSON)
		}
	}
	k.kubectl("-n", ns, "delete", "pod", "served", "--grace-period=0", "--force")
	d.why(ns+"/served", why.PodUnknown)

	// A static pod, which the API server shows as a mirror.
	dir := optional(t, "SIGNET_KUBEBOX_DIR", "the state directory of the first cluster")
	file := filepath.Join(dir, "manifests", ns+".yaml")
	static := strings.Replace(d.manifest("static", front, firstCall), "  serviceAccountName: web\n", "", 1)
	if err := os.WriteFile(file, []byte(static), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(file) })
	mirror := d.why(ns+"/static-"+node, why.PodStatic)
	mirror.says(t, "signet entry create", "is a static pod", "on node "+node)
	if !mirror.Pod.Static || mirror.Pod.Node != node {
		t.Errorf("a static pod:\n%s", mirror.JSON)
	}
	k.until("the static pod runs", func(out string, err error) bool { return err == nil && strings.Contains(out, "took: ") }, "-n", ns, "logs", mirror.Pod.Name)
	if out := k.kubectl("-n", ns, "logs", mirror.Pod.Name); !strings.Contains(out, "PermissionDenied") {
		t.Errorf("a static pod: %q", out)
	}
}
