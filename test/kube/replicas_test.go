//go:build kube

package kube

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/kube"
	"github.com/signet-id/signet/test/etcdtest"
	"github.com/signet-id/signet/test/replicatest"
)

// several are replicas of a CA, as processes on a real etcd, that watch one cluster: an API server, and nodes and pods that the test
// makes. Each replica reaches the API server by a wire of its own.
type several struct {
	*scene
	fleet *replicatest.Fleet
	wires []*wire
	node  string
}

func startSeveral(t *testing.T, ctx context.Context, n int) *several {
	t.Helper()
	k := open(t, ctx, need(t, "SIGNET_KUBECONFIG_WEBHOOK", "the path of a kubeconfig of an admin of an API server"), "")
	k.define()
	if _, err := k.try("", "create", "namespace", "signet-system"); err != nil && !strings.Contains(err.Error(), "AlreadyExists") {
		t.Fatal(err)
	}
	s := &several{node: k.namespace + "-node"}
	for range n {
		s.wires = append(s.wires, newWire(t, k.kubeconfig))
	}
	k.apply(fmt.Sprintf("{apiVersion: v1, kind: Node, metadata: {name: %s}}", s.node))
	k.atEnd("delete", "node", s.node)
	s.fleet = replicatest.Start(t, replicatest.Config{Etcd: etcdtest.Start(t, etcdtest.Config{}), Replicas: n, More: func(i int) string {
		return fmt.Sprintf(`node_attestors: {k8s_psat: {clusters: {prod: {service_accounts: ["%s:agent"], kubeconfig: %s}}}}
kubernetes: {clusters: {prod: {kubeconfig: %s, namespace: %s, pods: {}, resources: {}, bundle: {}}}}
`, k.namespace, k.kubeconfig, s.wires[i].kubeconfig, k.namespace)
	}})
	client, err := kube.Open("prod", k.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	s.scene = &scene{cluster: k, dyn: client.Dynamic, admin: s.fleet.Replicas[0].Admin}
	return s
}

// place makes a pod that runs on the node as far as the API server knows, and returns its UID.
func (s *several) place(name, serviceAccount string) string {
	s.t.Helper()
	s.apply(fmt.Sprintf("{apiVersion: v1, kind: Pod, metadata: {name: %s, namespace: %s}, spec: {nodeName: %s, serviceAccountName: %s, terminationGracePeriodSeconds: 0, containers: [{name: main, image: none}]}}",
		name, s.namespace, s.node, serviceAccount))
	return s.kubectl("-n", s.namespace, "get", "pod", name, "-o", "jsonpath={.metadata.uid}")
}

func (s *several) unplace(name string) {
	s.t.Helper()
	s.kubectl("-n", s.namespace, "delete", "pod", name, "--force", "--grace-period=0")
}

// agent starts the node's agent, which reaches the replicas by their front, and returns a connection to its admin socket.
func (s *several) agent() grpc.ClientConnInterface {
	s.t.Helper()
	s.place("agent", "agent")
	s.kubectl("-n", s.namespace, "patch", "pod", "agent", "--subresource=status", "-p", `{"status":{"hostIP":"192.0.2.7","hostIPs":[{"ip":"192.0.2.7"}]}}`)
	uid := s.kubectl("-n", s.namespace, "get", "pod", "agent", "-o", "jsonpath={.metadata.uid}")
	dir, err := os.MkdirTemp("", "node")
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { os.RemoveAll(dir) })
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte(s.cluster.create("agent", "--bound-object-kind=Pod", "--bound-object-name=agent", "--bound-object-uid="+uid, "--audience=spire-server")), 0o600); err != nil {
		s.t.Fatal(err)
	}
	roots := filepath.Join(dir, "bundle.pem")
	if err := os.WriteFile(roots, []byte(s.bundlePEM()), 0o600); err != nil {
		s.t.Fatal(err)
	}
	c := agent.Config{TrustDomain: "example.org", ServerAddress: s.fleet.Front.Addr(), DataDir: filepath.Join(dir, "data"), SocketPath: filepath.Join(dir, "api", "a.sock"), TrustBundlePath: roots,
		Version: "test", Log: slog.New(slog.DiscardHandler)}
	c.AdminSocket = agent.AdminSocket{Path: filepath.Join(dir, "admin", "b.sock"), AuthorizedDelegates: []string{"/me"}}
	c.NodeAttestation.K8sPSAT = &agent.K8sPSAT{Cluster: "prod", TokenPath: token}
	a, err := agent.New(c)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	s.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("agent: %v", err)
		}
	})
	wait(s.t, s.ctx, a.Ready(), "the agent is ready")
	conn, err := grpc.NewClient("unix://"+c.AdminSocket.Path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

// bundlePEM is the trust bundle as the leader publishes it.
func (s *several) bundlePEM() string {
	s.t.Helper()
	for {
		text, err := s.try("", "-n", s.namespace, "get", "configmap", "signet-bundle", "-o", `jsonpath={.data.bundle\.pem}`)
		if err == nil && text != "" {
			return text + "\n"
		}
		pause(s.t, s.ctx)
	}
}

// A stream is what the agent's workloads of one pod are handed, message by message.
type stream struct {
	mu   sync.Mutex
	seen []string // of each message: "ID serial", sorted
	news chan struct{}
}

// follow subscribes to what a pod's processes get.
func (s *several) follow(conn grpc.ClientConnInterface, uid string) *stream {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	sub, err := delegatedv1.NewDelegatedIdentityClient(conn).SubscribeToX509SVIDs(ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{{Type: "k8s", Value: "pod-uid:" + uid}}})
	if err != nil {
		cancel()
		s.t.Fatal(err)
	}
	out := &stream{news: make(chan struct{}, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			m, err := sub.Recv()
			if err != nil {
				if ctx.Err() == nil {
					s.t.Errorf("the stream of pod %s ended: %v", uid, err)
				}
				return
			}
			var ids []string
			for _, x := range m.X509Svids {
				ids = append(ids, fmt.Sprintf("%s %x", x.X509Svid.Id.Path, x.X509Svid.CertChain[0][:40]))
			}
			slices.Sort(ids)
			out.mu.Lock()
			out.seen = append(out.seen, strings.Join(ids, ","))
			out.mu.Unlock()
			select {
			case out.news <- struct{}{}:
			default:
			}
		}
	}()
	s.t.Cleanup(func() { cancel(); <-done })
	return out
}

// all is each message until now.
func (x *stream) all() []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.seen)
}

// until waits for a message with something, or with nothing.
func (x *stream) until(s *several, what string, nothing bool) {
	s.t.Helper()
	for {
		if all := x.all(); len(all) > 0 && (all[len(all)-1] == "") == nothing {
			return
		}
		select {
		case <-x.news:
		case <-s.ctx.Done():
			s.t.Fatalf("waited in vain until %s; it was told %q", what, x.all())
		}
	}
}

// connected waits until the agent follows a replica.
func (s *several) connected(r *replicatest.Replica) {
	s.t.Helper()
	replicatest.Eventually(s.t, "the agent to follow "+r.Name, func() error {
		list, err := r.Admin.ListAgentStatus(s.ctx, &adminv1.ListAgentStatusRequest{})
		if err != nil {
			return err
		}
		for _, a := range list.Agents {
			if a.Connected && a.AcknowledgedRevision > 0 {
				return nil
			}
		}
		return fmt.Errorf("it does not")
	})
}

// knows waits until a replica has all pods of the cluster, and the Identity stands for so many.
func (s *several) knows(r *replicatest.Replica, name string, pods int64) {
	s.t.Helper()
	replicatest.Eventually(s.t, fmt.Sprintf("%s to know %d pods of %s", r.Name, pods, name), func() error {
		res, err := r.Admin.GetResources(s.ctx, &adminv1.GetResourcesRequest{Kind: "Identity", Name: name})
		if err == nil && res.Resources[0].Pods != pods {
			err = fmt.Errorf("it knows %d", res.Resources[0].Pods)
		}
		return err
	})
}

const (
	leads = "this replica leads\""
	lags  = "the agent was told more of its cluster than is known here"
)

// leader waits until some replica has begun to lead after it had been said so often, and returns it.
func (s *several) leader(said map[*replicatest.Replica]int) *replicatest.Replica {
	s.t.Helper()
	for {
		for _, r := range s.fleet.Replicas {
			if n := strings.Count(r.Out.String(), leads); n > said[r] {
				said[r] = n
				return r
			}
		}
		pause(s.t, s.ctx)
	}
}

func (s *several) other(r *replicatest.Replica) *replicatest.Replica {
	return s.fleet.Replicas[1-slices.Index(s.fleet.Replicas, r)]
}

// An agent that goes from replica to replica re-issues nothing, and one that lags behind at the API server takes no new pod's identity
// from it and gives none back that a deleted pod had.
func TestReplicasOfOneCluster(t *testing.T) {
	ctx := bounded(t)
	s := startSeveral(t, ctx, 2)
	s.leader(map[*replicatest.Replica]int{})
	a, b := s.fleet.Replicas[0], s.fleet.Replicas[1]
	s.mustCreate("Identity", "pods", "spiffeID: '/ns/{{ .k8s.ns }}/pod/{{ .k8s.pod }}'\n")
	s.mustCreate("Identity", "me", fmt.Sprintf("spiffeID: /me\nmatch: ['unix:uid:%d']\n", os.Getuid()))
	s.accepted("Identity", "pods")
	s.accepted("Identity", "me")
	s.fleet.Front.To(a)
	conn := s.agent()
	streams := map[string]*stream{}
	for _, name := range []string{"one", "two", "three"} {
		streams[name] = s.follow(conn, s.place(name, "web"))
		streams[name].until(s, "pod "+name+" has its SVID", false)
	}
	for _, r := range []*replicatest.Replica{a, b} {
		s.knows(r, "pods", 4) // with the agent's
	}
	before := map[string]int{}
	for name, x := range streams {
		before[name] = len(x.all())
	}
	began := time.Now()
	for range 4 {
		for _, r := range []*replicatest.Replica{b, a} {
			s.fleet.Front.To(r)
			s.connected(r)
		}
	}
	t.Logf("eight changes of the replica: %v", time.Since(began).Round(time.Millisecond))
	for name, x := range streams {
		if all := x.all(); len(all) != before[name] {
			t.Errorf("pod %s, over 8 changes of the replica, is handed %q after %d", name, all, before[name])
		}
	}

	began = time.Now()
	// The second replica hears nothing more of the API server, and the agent changes to it.
	s.wires[1].hold()
	streams["new"] = s.follow(conn, s.place("new", "web"))
	streams["new"].until(s, "the new pod has its SVID", false)
	s.unplace("one")
	streams["one"].until(s, "the deleted pod has nothing", true)
	before = map[string]int{}
	for name, x := range streams {
		before[name] = len(x.all())
	}
	s.fleet.Front.To(b)
	s.connected(b)
	if !strings.Contains(b.Out.String(), lags) {
		t.Errorf("%s does not say that it lags", b.Name)
	}
	s.knows(b, "pods", 4) // the deleted one, and not the new one
	t.Logf("a pod comes, one goes, and the agent changes to the replica that lags: %v", time.Since(began).Round(time.Millisecond))
	began = time.Now()
	s.wires[1].release()
	replicatest.Eventually(t, "the replica to have caught up", func() error {
		var err error
		if _, err = s.try("", "-n", s.namespace, "get", "pod", "new"); err != nil {
			return err
		}
		last := s.follow(conn, s.kubectl("-n", s.namespace, "get", "pod", "new", "-o", "jsonpath={.metadata.uid}"))
		last.until(s, "it is still there", false)
		return nil
	})
	// What comes next at that replica comes after it has caught up.
	streams["next"] = s.follow(conn, s.place("next", "web"))
	streams["next"].until(s, "the next pod has its SVID from the replica that had lagged", false)
	t.Logf("from the API server's answer to the next pod's SVID: %v", time.Since(began).Round(time.Millisecond))
	for name, n := range before {
		if all := streams[name].all(); len(all) != n {
			t.Errorf("pod %s is handed %q at a replica that lags, after %d messages", name, all, n)
		}
	}
}

// number reads a variable of the environment that makes a test larger.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%s is not a positive number", name, text)
	}
	return n
}

func rounded(all []time.Duration) (out []time.Duration) {
	for _, d := range all {
		out = append(out, d.Round(10*time.Millisecond))
	}
	slices.Sort(out)
	return out
}

// The leader is killed while pods and custom resources come and go. Another replica takes over within the Lease, no resource is lost, the
// trust bundle is published, and the agent goes on at the other one. SIGNET_TAKEOVERS says how often; figures are for docs/performance.md.
func TestLeaderOfSeveralKilled(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	s := startSeveral(t, ctx, 2)
	said := map[*replicatest.Replica]int{}
	leader := s.leader(said)
	s.mustCreate("Identity", "pods", "spiffeID: '/ns/{{ .k8s.ns }}/pod/{{ .k8s.pod }}'\n")
	s.mustCreate("Identity", "me", fmt.Sprintf("spiffeID: /me\nmatch: ['unix:uid:%d']\n", os.Getuid()))
	s.accepted("Identity", "pods")
	s.accepted("Identity", "me")
	conn := s.agent()
	lasting := s.follow(conn, s.place("lasting", "web"))
	lasting.until(s, "the lasting pod has its SVID", false)
	handed := len(lasting.all())

	want := map[string]bool{} // policies that are to be there
	var taken, agents []time.Duration
	for round := range number(t, "SIGNET_TAKEOVERS", 2) {
		var before sync.WaitGroup
		change := func(part string) {
			for i := range 5 {
				name := fmt.Sprintf("p%d-%s-%d", round, part, i)
				s.mustCreate("ClusterCallPolicy", name, "service: /web\nallow:\n- from: [/shop]\n")
				want[name] = true
				if i%2 == 1 {
					s.remove("ClusterCallPolicy", name)
					delete(want, name)
				}
			}
		}
		before.Go(func() { change("a") })
		other := s.other(leader)
		began := time.Now()
		leader.End(syscall.SIGKILL)
		s.fleet.Front.Cut()
		s.connected(other)
		agents = append(agents, time.Since(began))
		before.Wait()
		change("b")
		s.kubectl("-n", s.namespace, "delete", "configmap", "signet-bundle")
		pod := fmt.Sprintf("pod%d", round)
		fresh := s.follow(conn, s.place(pod, "web"))
		fresh.until(s, "a pod that came while nobody leads has its SVID", false)
		if got := s.leader(said); got != other {
			t.Fatalf("%s leads", got.Name)
		}
		taken = append(taken, time.Since(began))
		for name := range want {
			u := s.accepted("ClusterCallPolicy", name)
			status, _, _ := unstructured.NestedInt64(u.Object, "status", "revision")
			res, err := other.Admin.GetResources(ctx, &adminv1.GetResourcesRequest{Kind: "CallPolicy", Name: name})
			if err != nil || res.Resources[0].Revision != status {
				t.Errorf("policy %s: the status says revision %d, the CA holds %v, %v", name, status, res, err)
			}
		}
		s.bundlePEM()
		s.unplace(pod)
		fresh.until(s, "the pod is gone", true)
		leader.Start()
		leader.Answers()
		s.admin = leader.Admin
		res, err := leader.Admin.GetResources(ctx, &adminv1.GetResourcesRequest{Kind: "CallPolicy"})
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]bool{}
		for _, r := range res.Resources {
			got[r.Name] = true
		}
		if !maps.Equal(got, want) {
			t.Errorf("round %d: the CA holds the policies %v, want %v", round, slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
		}
		leader = other
	}
	if all := lasting.all(); len(all) != handed {
		t.Errorf("the lasting pod is handed %q, after %d messages", all, handed)
	}
	t.Logf("kill -9 of the leader until another one leads: %v", rounded(taken))
	t.Logf("until the agent follows another one: %v", rounded(agents))
}

// A leader that is stopped for longer than its Lease lasts, and goes on, writes nothing that is out of date: neither to the store nor at the
// API server.
func TestLeaderOfSeveralStopped(t *testing.T) {
	ctx := bounded(t)
	s := startSeveral(t, ctx, 2)
	said := map[*replicatest.Replica]int{}
	leader := s.leader(said)
	for i := range 20 {
		s.mustCreate("ClusterCallPolicy", fmt.Sprintf("p%d", i), "service: /web\nallow:\n- from: [/old]\n")
	}
	for i := range 20 {
		s.accepted("ClusterCallPolicy", fmt.Sprintf("p%d", i))
	}
	leader.Signal(syscall.SIGSTOP)
	t.Cleanup(func() { leader.Signal(syscall.SIGCONT) })
	if got := s.leader(said); got == leader {
		t.Fatal("who is stopped leads")
	}
	s.admin = s.other(leader).Admin
	for i := range 20 {
		if i%2 == 0 {
			s.set("ClusterCallPolicy", fmt.Sprintf("p%d", i), "service: /web\nallow:\n- from: [/new]\n", nil)
		} else {
			s.remove("ClusterCallPolicy", fmt.Sprintf("p%d", i))
		}
	}
	s.mustCreate("Revocation", "gone", "id: /old\nreason: test\n")
	s.accepted("Revocation", "gone")
	for i := range 20 {
		if i%2 == 0 {
			s.accepted("ClusterCallPolicy", fmt.Sprintf("p%d", i))
		} else {
			s.gone("CallPolicy", fmt.Sprintf("p%d", i))
		}
	}
	state := func() string {
		var out []string
		for _, kind := range []string{"CallPolicy", "Revocation"} {
			res, err := s.admin.GetResources(ctx, &adminv1.GetResourcesRequest{Kind: kind})
			if err != nil {
				t.Fatal(err)
			}
			if len(res.Resources) == 0 {
				t.Fatalf("the CA has no %s", kind)
			}
			for _, r := range res.Resources {
				out = append(out, fmt.Sprint(kind, " ", r.Name, " ", r.Revision))
			}
		}
		slices.Sort(out)
		return strings.Join(out, "\n") + "\n" + s.kubectl("get", "clustercallpolicies.signet-id.github.io,revocations.signet-id.github.io", "-o", `jsonpath={range .items[*]}{.metadata.name} {.metadata.resourceVersion}{"\n"}{end}`) +
			s.kubectl("-n", s.namespace, "get", "configmap", "signet-bundle", "-o", "jsonpath={.metadata.resourceVersion}")
	}
	before := state()
	leader.Signal(syscall.SIGCONT)
	replicatest.Eventually(t, "the former leader to hear of it", func() error {
		if !strings.Contains(leader.Out.String(), "lost the lease") && !strings.Contains(leader.Out.String(), "another replica has begun to lead") {
			return fmt.Errorf("it does not")
		}
		return nil
	})
	// It knows all that happened by now, and nothing more comes of it.
	replicatest.Eventually(t, "the former leader to answer", func() error {
		_, err := leader.Admin.GetStatus(ctx, &adminv1.GetStatusRequest{})
		return err
	})
	if after := state(); after != before {
		t.Errorf("after it went on there is\n%s\nbefore there was\n%s", after, before)
	}
}
