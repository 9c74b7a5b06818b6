//go:build kube

package kube

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/signet-id/signet/ca"
)

// A sample of durations, for what it says of them.
type sample []time.Duration

func (s sample) quantile(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(s))
	return sorted[max(0, int(math.Ceil(q*float64(len(sorted))))-1)]
}

func (s sample) String() string {
	return fmt.Sprintf("p50 %v, p99 %v, most %v", s.quantile(0.5).Round(time.Millisecond), s.quantile(0.99).Round(time.Millisecond), s.quantile(1).Round(time.Millisecond))
}

// measured reads how much is to be measured; without the variable it is little, which shows that the measuring works.
func measured(t *testing.T, name string, otherwise int) int {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		t.Fatalf("%s: %q is no number above 0", name, v)
	}
	return n
}

// From a pod's creation to its SVID in its hands, beside pods of the same image and volumes that only say when they run, made in turn.
// Then what the agent costs that has them all. SIGNET_MEASURE_PODS is how many of each, SIGNET_MEASURE_IDLE for how many seconds nothing changes.
// SIGNET_MEASURE_TRACE asks the kubelet too, when it knows what runs. The figures are in docs/performance.md.
func TestMeasurePods(t *testing.T) {
	n, idle := measured(t, "SIGNET_MEASURE_PODS", 2), time.Duration(measured(t, "SIGNET_MEASURE_IDLE", 3))*time.Second
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Minute+idle)
	defer cancel()
	k := first(t, ctx)
	k.allow()
	s := startCA(t, map[string]*cluster{"prod": k}, func(c *ca.Config) {
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{"prod": {Kubeconfig: k.credentials("ca"), Namespace: k.namespace, Pods: &ca.KubernetesPods{}}}
	})
	d := k.runAgents(s, "prod", nil)
	s.Apply("{kind: Identity, name: pods, spiffeID: '/ns/{{ .k8s.ns }}/pod/{{ .k8s.pod }}', 'on': ['k8s_psat:cluster:prod']}\n")
	admin := k.admin()

	var plain, started, served, inside, kubelet, agent sample
	trace := os.Getenv("SIGNET_MEASURE_TRACE") != ""
	asked := 0
	for i := range n {
		for _, how := range []string{"starts", "svid"} {
			name := fmt.Sprintf("%s-%03d", how, i)
			created := time.Now()
			if _, err := admin.CoreV1().Pods(k.namespace).Create(ctx, d.timed(name, how), metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			if how == "starts" {
				at, _, _ := k.stamp(admin, name, "started: ")
				plain = append(plain, at.Sub(created))
				continue
			}
			var listed <-chan time.Time
			if trace {
				listed = k.listed(admin, name)
			}
			svid, rest, log := k.stamp(admin, name, "svid: ")
			if want := "/ns/" + k.namespace + "/pod/" + name; rest != want {
				t.Fatalf("pod %s is %q, want %q", name, rest, want)
			}
			at, _, ok := stampIn(log, "started: ")
			if !ok {
				t.Fatalf("pod %s says %q", name, log)
			}
			started, served, inside = append(started, at.Sub(created)), append(served, svid.Sub(created)), append(inside, svid.Sub(at))
			asked += strings.Count(log, "none: ")
			if trace {
				known := <-listed
				kubelet, agent = append(kubelet, known.Sub(at)), append(agent, svid.Sub(known))
			}
		}
	}
	ratio := func(q float64) float64 { return float64(served.quantile(q)) / float64(plain.quantile(q)) }
	t.Logf("%d pods of each, one after the other: created → program runs, without SVID: %v; with: %v", n, plain, started)
	t.Logf("created → SVID in hand: %v; as a ratio to pod start in the same run: p50 %.2f, p99 %.2f", served, ratio(0.5), ratio(0.99))
	t.Logf("program runs → SVID in hand: %v; calls that were refused before: %d", inside, asked)

	if trace {
		t.Logf("of that: program runs → the kubelet lists the container as running (asked every 20 ms): %v; from there to the SVID: %v", kubelet, agent)
	}

	uid := k.kubectl("-n", k.namespace, "get", "pod", "-l", "app=agent", "-o", "jsonpath={.items[0].metadata.uid}")
	pids := processesOf(t, uid, "signet")
	if len(pids) == 0 {
		t.Fatal("the agent's processes are not found")
	}
	before, lists, audit := cpuOf(t, pids), k.kubeletRequests(), k.auditLines()
	pauseFor(t, ctx, idle)
	after, more, auditNow := cpuOf(t, pids), k.kubeletRequests(), k.auditLines()
	pods := k.kubectl("get", "pods", "-A", "--field-selector=status.phase=Running", "-o", "jsonpath={.items[*].metadata.name}")
	t.Logf("agent with %d pods on its node, %d of them with a stream, for %v in which nothing changed:", len(strings.Fields(pods)), n, idle)
	for pid := range before {
		t.Logf("  process %q: %.1f MiB resident, of which %.1f MiB are its own; %.1f ms of CPU a minute", commOf(pid), mib(t, pid, "VmRSS"), mib(t, pid, "RssAnon"),
			float64((after[pid]-before[pid]).Microseconds())/1000/idle.Minutes())
	}
	t.Logf("  of its kubelet it asked for pods %v times", more-lists)
	k.logAudit(auditNow[len(audit):], idle)
}

// timed is a pod of the workload image as others are, which says when.
func (d *daemonSet) timed(name, how string) *corev1.Pod {
	grace, no := int64(0), false
	dir := corev1.HostPathDirectory
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: d.k.namespace},
		Spec: corev1.PodSpec{ServiceAccountName: "web", AutomountServiceAccountToken: &no, TerminationGracePeriodSeconds: &grace,
			Volumes: []corev1.Volume{{Name: "socket", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: d.dir, Type: &dir}}}},
			Containers: []corev1.Container{{Name: "main", Image: os.Getenv("SIGNET_KUBE_WORKLOAD_IMAGE"), Command: []string{"/workload", how},
				Env:          []corev1.EnvVar{{Name: "SPIFFE_ENDPOINT_SOCKET", Value: "unix://" + d.dir + "/agent.sock"}},
				VolumeMounts: []corev1.VolumeMount{{Name: "socket", MountPath: d.dir, ReadOnly: true}}}}}}
}

// stamp waits until a pod has logged a line that begins with want and a time, and returns that, what follows, and all that it logged.
func (k *cluster) stamp(admin kubernetes.Interface, pod, want string) (at time.Time, rest, log string) {
	k.t.Helper()
	for {
		data, err := admin.CoreV1().Pods(k.namespace).GetLogs(pod, &corev1.PodLogOptions{}).DoRaw(k.ctx)
		if err == nil {
			if at, rest, ok := stampIn(string(data), want); ok {
				return at, rest, string(data)
			}
		}
		if k.ctx.Err() != nil {
			k.t.Fatalf("pod %s: %q, %v", pod, data, err)
		}
		pause(k.t, k.ctx)
	}
}

// listed tells when the kubelet first listed the container of a pod as running. It is asked through the API server, every 20 ms.
func (k *cluster) listed(admin kubernetes.Interface, pod string) <-chan time.Time {
	node := k.kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")
	out := make(chan time.Time, 1)
	go func() {
		defer close(out) // a zero time, if the test ends first
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			data, err := admin.CoreV1().RESTClient().Get().AbsPath("/api/v1/nodes/" + node + "/proxy/pods/").DoRaw(k.ctx)
			var list corev1.PodList
			if err == nil && json.Unmarshal(data, &list) == nil {
				for _, p := range list.Items {
					if p.Name == pod && len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].State.Running != nil {
						out <- time.Now()
						return
					}
				}
			}
			select {
			case <-tick.C:
			case <-k.ctx.Done():
				return
			}
		}
	}()
	return out
}

func stampIn(log, want string) (time.Time, string, bool) {
	for line := range strings.Lines(log) {
		text, ok := strings.CutPrefix(line, want)
		if !ok {
			continue
		}
		number, rest, _ := strings.Cut(strings.TrimSpace(text), " ")
		ns, err := strconv.ParseInt(number, 10, 64)
		return time.Unix(0, ns), rest, err == nil
	}
	return time.Time{}, "", false
}

// processesOf are the processes of a pod on this machine whose program's name begins with a word.
func processesOf(t *testing.T, podUID, program string) (out []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil || !strings.Contains(strings.ReplaceAll(string(text), "_", "-"), podUID) {
			continue
		}
		pid, _ := strconv.Atoi(strings.Split(f, "/")[2])
		if c := commOf(pid); strings.HasPrefix(c, program) {
			out = append(out, pid)
		}
	}
	return out
}

// commOf is what a process is, with its arguments.
func commOf(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	program, args, _ := strings.Cut(strings.ReplaceAll(strings.TrimRight(string(text), "\x00"), "\x00", " "), " ")
	return strings.TrimSpace(filepath.Base(program) + " " + args)
}

// mib is a size in /proc/PID/status.
func mib(t *testing.T, pid int, field string) float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib / 1024
		}
	}
	t.Fatalf("no %s in /proc/PID/status", field)
	return 0
}

// cpuOf is the processor time of each process until now.
func cpuOf(t *testing.T, pids []int) map[int]time.Duration {
	t.Helper()
	out := map[int]time.Duration{}
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(text[strings.LastIndex(string(text), ")")+1:]))
		for _, f := range fields[11:13] { // utime and stime, in hundredths of a second
			ticks, err := strconv.Atoi(f)
			if err != nil {
				t.Fatal(err)
			}
			out[pid] += time.Duration(ticks) * 10 * time.Millisecond
		}
	}
	return out
}

// kubeletRequests is how often the kubelet was asked for its pods. Nobody but the agent does.
func (k *cluster) kubeletRequests() (n int) {
	k.t.Helper()
	node := k.kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")
	for line := range strings.Lines(k.kubectl("get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics")) {
		if strings.HasPrefix(line, "kubelet_http_requests_total{") && strings.Contains(line, `path="pods"`) {
			v, err := strconv.ParseFloat(strings.Fields(line)[len(strings.Fields(line))-1], 64)
			if err != nil {
				k.t.Fatal(err)
			}
			n += int(v)
		}
	}
	return n
}

// A request that the API server has noted in its audit log.
type noted struct {
	Verb      string
	UserAgent string
	User      struct{ Username string }
	ObjectRef struct{ APIGroup, Resource, Subresource, Name string }
}

// auditLines is all that the API server was asked for, if kubebox was started with -audit.
func (k *cluster) auditLines() (out []noted) {
	k.t.Helper()
	f, err := os.Open(filepath.Join(os.Getenv("SIGNET_KUBEBOX_DIR"), "audit.log"))
	if err != nil {
		return nil
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var n noted
		if json.Unmarshal(lines.Bytes(), &n) == nil { // the last one may be half written
			out = append(out, n)
		}
	}
	return out
}

// logAudit says what the service accounts of the test asked for, and what was asked on the agent's behalf by its kubelet.
func (k *cluster) logAudit(lines []noted, in time.Duration) {
	k.t.Helper()
	count := map[string]int{}
	for _, n := range lines {
		who := n.User.Username
		about := n.ObjectRef.Resource == "tokenreviews" || n.ObjectRef.Resource == "subjectaccessreviews"
		if !strings.HasPrefix(who, "system:serviceaccount:"+k.namespace+":") && !(about && strings.HasPrefix(who, "system:node:")) {
			continue
		}
		what := n.ObjectRef.Resource
		if n.ObjectRef.Subresource != "" {
			what += "/" + n.ObjectRef.Subresource
		}
		count[strings.TrimPrefix(who, "system:serviceaccount:"+k.namespace+":")+" "+n.Verb+" "+what]++
	}
	total := map[string]int{}
	for what, n := range count {
		total[strings.Fields(what)[0]] += n
	}
	if len(lines) == 0 {
		k.t.Logf("  no audit log: start kubebox with -audit to see what the API server was asked")
	}
	for _, what := range slices.Sorted(maps.Keys(count)) {
		k.t.Logf("  asked of the API server in %v: %s: %d, so %.0f an hour", in, what, count[what], float64(count[what])*float64(time.Hour)/float64(in))
	}
	for _, who := range slices.Sorted(maps.Keys(total)) {
		k.t.Logf("  in all by %s: %d, so %.0f an hour", who, total[who], float64(total[who])*float64(time.Hour)/float64(in))
	}
}
