package k8s

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signet-id/signet/workloadapi/peer"
)

const (
	kubeletEnv = "SIGNET_TEST_KUBELET"

	benchPods = 110
	benchRate = 20
	// lag is how long a kubelet takes to know a container that runs.
	lag = time.Second
)

// benchPod is a pod with as much in it as pods have: about 8 KiB.
func benchPod(i int, extra ...object) object {
	uid := fmt.Sprintf("%08x-1111-2222-3333-444444444444", i)
	p := podObject(uid, "shop", fmt.Sprint("web-", i), append([]object{running("web", fmt.Sprintf("%064x", i))}, extra...)...)
	var env, mounts, managed []object
	for j := range 20 {
		env = append(env, object{"name": fmt.Sprint("VARIABLE_", j), "valueFrom": object{"configMapKeyRef": object{"name": "settings", "key": fmt.Sprint("key-", j)}}})
		mounts = append(mounts, object{"name": fmt.Sprint("volume-", j), "mountPath": fmt.Sprint("/var/lib/data/", j), "readOnly": true})
		managed = append(managed, object{"manager": "kubelet", "operation": "Update", "fieldsV1": object{"f:status": object{fmt.Sprintf("k:{\"type\":\"Ready%d\"}", j): object{".": object{}, "f:lastTransitionTime": object{}}}}})
	}
	p["metadata"].(object)["managedFields"] = managed
	p["spec"].(object)["containers"] = []object{{"name": "web", "image": "registry.example/web:1", "env": env, "volumeMounts": mounts}}
	return p
}

// benchKubelet serves 110 pods, and containers of the first one that /start names, a second after that.
func benchKubelet() {
	var lists atomic.Int64
	var mu sync.Mutex
	started := map[string]time.Time{}
	rest := make([]string, 0, benchPods)
	for i := 1; i < benchPods; i++ {
		rest = append(rest, toJSON(benchPod(i)))
	}
	most := strings.Join(rest, ",")
	mux := http.NewServeMux()
	mux.HandleFunc("/pods", func(w http.ResponseWriter, _ *http.Request) {
		lists.Add(1)
		var extra []object
		mu.Lock()
		for id, at := range started {
			if time.Since(at) > lag {
				extra = append(extra, running("job", id))
			}
		}
		mu.Unlock()
		_, _ = io.WriteString(w, `{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[`+toJSON(benchPod(0, extra...))+","+most+"]}")
	})
	mux.HandleFunc("/start", func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		started[r.FormValue("id")] = time.Now()
	})
	mux.HandleFunc("/lists", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, lists.Load()) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(l.Addr().(*net.TCPAddr).Port)
	go func() { _ = http.Serve(l, mux) }()
	_, _ = io.Copy(io.Discard, os.Stdin)
}

func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// A node of 110 pods, on which twenty processes a second are attested for the first time: of containers that are known, and with
// one new container a second. The kubelet is another process. What it costs is compared with what it costs in the same process
// to decode as many lists as were needed, whole, into no more than what is needed of them.
func BenchmarkAttest110Pods(b *testing.B) {
	for _, churn := range []bool{false, true} {
		name := "known"
		if churn {
			name = "one-new-a-second"
		}
		b.Run(name, func(b *testing.B) { benchAttest(b, churn) })
	}
}

func benchAttest(b *testing.B, churn bool) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), kubeletEnv+"=1")
	cmd.Stderr = os.Stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { input.Close(); _ = cmd.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	port, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		b.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	get := func(path string) string {
		resp, err := client.Get(fmt.Sprint("http://127.0.0.1:", port, path))
		if err != nil {
			b.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			b.Fatal(err)
		}
		return string(text)
	}
	m, err := New(Config{ReadOnlyPort: port, serviceAccountDir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	table, err := peer.NewTable(peer.Config{})
	if err != nil {
		b.Fatal(err)
	}
	defer table.Close()
	self, err := table.Open(int32(os.Getpid()))
	if err != nil {
		b.Fatal(err)
	}
	whole := []byte(get("/pods"))
	plain := plainDecode(b, whole)

	ticker := time.NewTicker(time.Second / benchRate)
	defer ticker.Stop()
	before, _ := strconv.Atoi(get("/lists"))
	var wg sync.WaitGroup
	begun, used := time.Now(), cpu(b)
	for i := 0; b.Loop(); i++ {
		<-ticker.C
		pod := i % benchPods
		id := fmt.Sprintf("%064x", pod)
		if churn && i%benchRate == 0 {
			pod, id = 0, fmt.Sprintf("%064x", 1<<20+i)
			get("/start?id=" + id)
		}
		wg.Go(func() {
			if _, err := m.finder.Find(self); err != nil {
				b.Error(err)
			}
			got, err := m.selectors(within(b, 20*time.Second), in(fmt.Sprintf("%08x-1111-2222-3333-444444444444", pod), id))
			if err != nil || len(got) < 10 {
				b.Errorf("%d selectors, %v", len(got), err)
			}
		})
	}
	wg.Wait()
	used, took := cpu(b)-used, time.Since(begun)
	after, _ := strconv.Atoi(get("/lists"))
	lists := float64(after - before)
	b.ReportMetric(used.Seconds()/took.Seconds()*100, "%-of-a-core")
	b.ReportMetric(lists/took.Seconds(), "lists/s")
	b.ReportMetric(used.Seconds()/(lists*plain.Seconds()), "plain-decodes/list")
	b.ReportMetric(float64(len(whole))/1024, "KiB/list")
	b.ReportMetric(0, "ns/op")
}

// plainDecode is the CPU time of decoding a list whole.
func plainDecode(b *testing.B, whole []byte) time.Duration {
	b.Helper()
	const times = 30
	used := cpu(b)
	for range times {
		var l struct {
			Items []podJSON `json:"items"`
		}
		if err := json.Unmarshal(whole, &l); err != nil || len(l.Items) != benchPods {
			b.Fatalf("%d pods, %v", len(l.Items), err)
		}
	}
	return (cpu(b) - used) / times
}
