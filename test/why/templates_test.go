package why

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	agentapi "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"

	"github.com/signet-id/signet/agent"
	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/internal/why"
)

// Tokens of two agents, in the form of JWTs.
const tokenHere, tokenThere = "here.a.b", "there.a.b"

// aCluster is one with the nodes n1, where the agent of a world is, and n2, and the pod prod/web-0 on n1.
func aCluster() *apiServer {
	return &apiServer{
		nodes:      []object{aNode("n1", uuid("1")), aNode("n2", uuid("2"))},
		namespaces: []object{aNamespace("prod"), aNamespace("signet-system")},
		pods: []object{aPod("prod", "web-0", podUID, "n1"), aPod("prod", "web-1", uuid("b"), "n2"),
			aPod("signet-system", "agent-1", uuid("c"), "n1", agentPod), aPod("signet-system", "agent-2", uuid("d"), "n2", agentPod)},
		tokens: map[string]string{tokenHere: "agent-1", tokenThere: "agent-2"},
	}
}

func agentPod(o object) { o["spec"].(object)["serviceAccountName"] = "signet-agent" }

// A clusterSpec says how a world in a cluster is.
type clusterSpec struct {
	api *apiServer // nil: aCluster
	// watched is the cluster's name in the CA's watch; empty: prod, under which agents attest.
	watched string
	// byToken lets the agent attest by a join token, and noKubelet attest no pods.
	byToken, noKubelet bool
}

// inCluster is a world whose CA watches the pods of a cluster, and whose agent is on its node n1.
func inCluster(s clusterSpec) maker {
	m := maker{}
	m.World = func(w *world) {
		api := s.api
		if api == nil {
			api = aCluster()
		}
		w.kubeconfig = api.start(w.T)
		for name, token := range map[string]string{"here": tokenHere, "there": tokenThere} {
			if err := os.WriteFile(filepath.Join(w.dir, name), []byte(token), 0o600); err != nil {
				w.Fatal(err)
			}
		}
	}
	m.CAOf = func(w *world, c *ca.Config) {
		c.NodeAttestors.K8sPSAT = &ca.K8sPSAT{Clusters: map[string]ca.K8sCluster{"prod": {ServiceAccounts: []string{"signet-system:signet-agent"}, Kubeconfig: w.kubeconfig}}}
		c.Kubernetes.Clusters = map[string]ca.KubernetesCluster{cmp.Or(s.watched, "prod"): {Kubeconfig: w.kubeconfig, Pods: &ca.KubernetesPods{}, DisableEvents: true}}
	}
	m.AgentOf = func(w *world, c *agent.Config) {
		if !s.byToken {
			c.JoinTokenFile = ""
			c.NodeAttestation.K8sPSAT = &agent.K8sPSAT{Cluster: "prod", TokenPath: filepath.Join(w.dir, "here")}
		}
		if !s.noKubelet {
			onKubernetes.Agent(c)
		}
	}
	return m
}

// template applies templated Identities, and waits until the CA knows the cluster.
func (w *world) template(more string) {
	w.Helper()
	w.apply("kind: Identity\nname: shop\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\n" + more + "\n")
	client := adminv1.NewPodsClient(w.conn(w.CASocket()))
	w.until("the pods of the cluster are known", func() bool {
		r, err := client.ExplainPod(context.Background(), &adminv1.ExplainPodRequest{Namespace: "prod", Name: "web-0"})
		if err != nil {
			w.Fatal(err)
		}
		return len(r.GetClusters()) == 0 || r.GetClusters()[0].GetSynced()
	})
}

// webProcess is a process of the pod.
func (w *world) webProcess() int32 {
	p := w.run(w.program("web/server"), as(4711, 4711))
	w.cgroup(p, "kubepods/burstable/pod"+podUID+"/"+containerID)
	return p
}

// templated builds the pod's process and a template, and asks about the pod on its node.
func templated(more string) func(*world) why.Target {
	return func(w *world) why.Target {
		w.template(more)
		w.webProcess()
		return why.Target{Pod: "prod/web-0"}
	}
}

// askedFor builds a template and asks about a pod of which no process is here.
func askedFor(pod, more string) func(*world) why.Target {
	return func(w *world) why.Target {
		w.template(more)
		return why.Target{Pod: pod}
	}
}

// atTheCA is the same where there is no agent to ask.
func atTheCA(pod, more string) func(*world) why.Target {
	return func(w *world) why.Target {
		w.noAgent = true
		return askedFor(pod, more)(w)
	}
}

// attestThere attests the agent of node n2 and returns its ID.
func (w *world) attestThere() string {
	w.Helper()
	dir := filepath.Join(w.dir, "two")
	if err := os.Mkdir(dir, 0o755); err != nil {
		w.Fatal(err)
	}
	c := agent.Config{TrustDomain: "example.org", ServerAddress: w.CAAddr(), DataDir: filepath.Join(dir, "data"), SocketPath: filepath.Join(dir, "a.sock"), TrustBundlePath: w.BundlePath(), Now: w.now, Log: slog.New(slog.DiscardHandler)}
	c.NodeAttestation.K8sPSAT = &agent.K8sPSAT{Cluster: "prod", TokenPath: filepath.Join(w.dir, "there")}
	a, err := agent.New(c)
	if err != nil {
		w.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	w.Cleanup(func() {
		cancel()
		<-done
	})
	select {
	case <-a.Ready():
	case <-time.After(eventually):
		w.Fatal("the agent of the other node is not ready")
	}
	return a.Status().ID.String()
}

// with is the cluster with another pod, which no watch tells of if it is secret.
func with(secret bool, p object, change ...func(*apiServer)) clusterSpec {
	a := aCluster()
	if secret {
		a.secret = append(a.secret, p)
	} else {
		a.pods = append(a.pods, p)
	}
	for _, f := range change {
		f(a)
	}
	return clusterSpec{api: a}
}

// templateSetups have a cluster that the CA watches, and templates that give a pod nothing.
var templateSetups = []setup{
	// What templates make of the pod, asked on its node.
	{name: "template, typo in the service account", root: true, make: inCluster(clusterSpec{}), build: templated("match: [k8s:ns:prod, k8s:sa:wbe]"), want: why.Typo, says: "Identity shop: it wants k8s:sa:wbe"},
	{name: "template, upper case", root: true, make: inCluster(clusterSpec{}), build: templated("match: [k8s:ns:Prod]"), want: why.WrongCase, says: "k8s:ns:prod"},
	{name: "template of another namespace", root: true, make: inCluster(clusterSpec{}), build: templated("match: [k8s:ns:bank, k8s:sa:web]"), want: why.NamespaceDiffers, says: "k8s:ns:prod"},
	{name: "template of another service account", root: true, make: inCluster(clusterSpec{}), build: templated("match: [k8s:ns:prod, k8s:sa:database]"), want: why.ServiceAccountDiffers, says: "k8s:sa:web"},
	{name: "template, another label", root: true, make: inCluster(clusterSpec{}), build: templated("match: ['k8s:pod-label:tier:backend']"), want: why.LabelDiffers, says: "k8s:pod-label:tier:front"},
	{name: "template, no such label", root: true, make: inCluster(clusterSpec{}), build: templated("match: ['k8s:pod-label:team:payments']"), want: why.LabelMissing, says: "no such label"},
	{name: "template, a label of the namespace", root: true, make: inCluster(clusterSpec{}), build: templated("match: ['k8s:ns-label:team:green']"), want: why.LabelDiffers, says: "k8s:ns-label:team:blue"},
	{name: "template, another owner", root: true, make: inCluster(clusterSpec{}), build: templated("match: ['k8s:pod-owner:Job:web']"), want: why.OwnerDiffers, says: "k8s:pod-owner:Job:web"},
	{name: "template of another cluster", root: true, make: inCluster(clusterSpec{}), build: templated("on: ['k8s_psat:cluster:staging']"), want: why.ClusterDiffers, says: "k8s_psat:cluster:prod"},
	{name: "template that is far from the pod", root: true, make: inCluster(clusterSpec{}), build: templated("match: [k8s:ns:bank, k8s:sa:database]"), want: why.NoTemplate, says: "Identity shop"},
	{name: "template, a variable is empty", root: true, make: inCluster(clusterSpec{}), build: templated("match: [k8s:ns:prod]\ndnsNames: ['{{ .k8s.label[\"zone\"] }}.internal']"), want: why.TemplateRefused, says: `.k8s.label["zone"] is empty`},
	{name: "template, its ID is registered", root: true, make: inCluster(clusterSpec{}), build: templated("---\nkind: Identity\nname: plain\nspiffeID: /ns/prod/sa/web\nmatch: [unix:uid:1]"), want: why.TemplateRefused, says: "is the SPIFFE ID of Identity plain"},
	{name: "template that has ended", root: true, make: inCluster(clusterSpec{}), build: templated("match: [k8s:ns:prod]\nexpiresAt: '2020-01-01T00:00:00Z'"), want: why.EntryExpired, says: "expiresAt"},
	{name: "template, on other nodes", root: true, make: inCluster(clusterSpec{}), build: templated("on: ['k8s_psat:agent_node_name:n2']"), want: why.EntryOtherNode, says: "k8s_psat:agent_node_name:n2"},
	{name: "template, another user", root: true, make: inCluster(clusterSpec{}), build: templated("match: [k8s:ns:prod, unix:uid:1]"), want: why.UserDiffers, says: "unix:uid:4711"},
	{name: "template, typo in the container's name", root: true, make: inCluster(clusterSpec{}), build: templated("match: [k8s:ns:prod, k8s:container-name:sevrer]"), want: why.Typo, says: "k8s:container-name:server"},
	{name: "template of a cluster that is not watched", root: true, make: inCluster(clusterSpec{watched: "other"}), build: templated("match: [k8s:ns:prod]"), want: why.ClusterNotWatched, says: "cluster prod, but those of other"},
	{name: "template, the agent attested by a join token", root: true, make: inCluster(clusterSpec{byToken: true}), build: templated("match: [k8s:ns:prod]"), want: why.NodeNotAttested, says: "attested by join_token"},
	{name: "static pod", root: true, make: inCluster(clusterSpec{api: static()}), build: templated(""), want: why.PodStatic, says: "static pod"},
	{name: "process of a former pod", root: true, make: inCluster(clusterSpec{api: replaced()}), build: templated(""), want: why.PodReplaced, says: uuid("e")},
	{name: "template, and all is well", root: true, make: inCluster(clusterSpec{}), build: func(w *world) why.Target {
		w.template("match: [k8s:ns:prod]")
		p := w.caller("fetch", as(4711, 4711), inPodCgroup(w))
		return pid(p)
	}, want: why.Served, says: "/ns/prod/sa/web"},

	// A pod of which no process is here.
	{name: "pod that there is not", make: inCluster(clusterSpec{}), build: askedFor("prod/nobody", ""), want: why.PodUnknown, says: "none of that name"},
	{name: "pod that is not scheduled", make: inCluster(with(false, aPod("prod", "pending", uuid("e"), "", func(o object) {
		o["status"] = object{"phase": "Pending", "conditions": []object{{"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available"}}}
	}))), build: askedFor("prod/pending", ""), want: why.PodNotScheduled, says: "0/2 nodes are available"},
	{name: "pod that has ended", make: inCluster(with(false, aPod("prod", "job", uuid("e"), "n1", func(o object) { o["status"] = object{"phase": "Succeeded"} }))), build: askedFor("prod/job", ""), want: why.PodEnded, says: "Succeeded"},
	{name: "pod that the CA has not seen yet", make: inCluster(with(true, aPod("prod", "new", uuid("e"), "n1"))), build: askedFor("prod/new", ""), want: why.PodNotSeen, says: "behind"},
	{name: "pod that is too large", make: inCluster(with(false, aPod("prod", "huge", uuid("e"), "n1", func(o object) {
		o["metadata"].(object)["labels"] = object{"x": strings.Repeat("x", 2<<20)}
	}))), build: askedFor("prod/huge", ""), want: why.PodLeftOut, says: "larger"},
	{name: "pod on a node that is not known", make: inCluster(with(false, aPod("prod", "lost", uuid("e"), "n9"))), build: askedFor("prod/lost", ""), want: why.NodeUnknown, says: "n9"},
	{name: "pod that was put on a former node", make: inCluster(with(false, aPod("prod", "old", uuid("e"), "n3"), func(a *apiServer) {
		n := aNode("n3", uuid("3"))
		n["metadata"].(object)["creationTimestamp"] = "2026-01-03T00:00:00Z"
		a.nodes = append(a.nodes, n)
	})), build: askedFor("prod/old", ""), want: why.NodeFormer, says: "delete pod old"},
	{name: "pod on a node without an agent", make: inCluster(clusterSpec{}), build: askedFor("prod/web-1", ""), want: why.NodeNotAttested, says: "node n2"},
	{name: "pod on another node", make: inCluster(clusterSpec{}), build: func(w *world) why.Target {
		w.attestThere()
		return askedFor("prod/web-1", "")(w)
	}, want: why.PodOtherNode, says: "node n2"},
	{name: "pod without a process on its node", make: inCluster(clusterSpec{}), build: askedFor("prod/web-0", ""), want: why.ProcessGone, says: "no process of pod prod/web-0"},
	{name: "pod on a node whose agent attests no pods", make: inCluster(clusterSpec{noKubelet: true}), build: askedFor("prod/web-0", ""), want: why.TypeNotAttested, says: "workload_attestation.k8s"},
	{name: "nodes that may not be listed", make: inCluster(clusterSpec{api: blind()}), build: func(w *world) why.Target {
		w.apply("kind: Identity\nname: shop\nspiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}\n")
		w.noAgent = true
		return why.Target{Pod: "prod/web-0"}
	}, want: why.ClusterNotSynced, says: "forbidden"},

	// The same asked of the CA alone.
	{name: "at the CA, a refused template", make: inCluster(clusterSpec{}), build: atTheCA("prod/web-0", "dnsNames: ['{{ .k8s.label[\"zone\"] }}.internal']"), want: why.TemplateRefused, says: "describe pod web-0"},
	{name: "at the CA, a typing error", make: inCluster(clusterSpec{}), build: atTheCA("prod/web-0", "match: [k8s:sa:wbe]"), want: why.Typo, says: "signet get identity shop -o yaml"},
	{name: "at the CA, a pod that is given what its process must be for", make: inCluster(clusterSpec{}), build: atTheCA("prod/web-0", "match: [k8s:ns:prod, unix:uid:1]"), want: why.Served, says: "(for its processes with unix:uid:1)"},
	{name: "at the CA, the node's agent is banned", make: inCluster(clusterSpec{}), build: func(w *world) why.Target {
		id := w.attestThere()
		if _, err := w.agents().BanAgent(context.Background(), &agentapi.BanAgentRequest{Id: spiffeID(id)}); err != nil {
			w.Fatal(err)
		}
		return atTheCA("prod/web-1", "")(w)
	}, want: why.AgentBanned, says: "node n2"},
	{name: "at the CA, a cluster that it does not watch", make: inCluster(clusterSpec{}), build: func(w *world) why.Target {
		t := atTheCA("prod/web-0", "")(w)
		t.Cluster = "staging"
		return t
	}, want: why.ClusterNotWatched, says: "cluster staging, but those of prod"},
	{name: "at a CA that watches no cluster", build: atTheCA("prod/web-0", ""), want: why.ClusterNotWatched, says: "no cluster"},
}

func static() *apiServer {
	a := aCluster()
	a.pods[0]["metadata"].(object)["annotations"] = object{"kubernetes.io/config.mirror": "x"}
	return a
}

func replaced() *apiServer {
	a := aCluster()
	a.pods[0]["metadata"].(object)["uid"] = uuid("e")
	return a
}

func blind() *apiServer {
	a := aCluster()
	a.refuses = "nodes"
	return a
}

// inPodCgroup starts a process in the pod.
func inPodCgroup(w *world) option {
	return func(c *exec.Cmd) {
		dir := w.cgroupDir("kubepods/burstable/pod" + podUID + "/" + containerID)
		f, err := os.Open(dir)
		if err != nil {
			w.Fatal(err)
		}
		w.Cleanup(func() { f.Close() })
		if c.SysProcAttr == nil {
			c.SysProcAttr = &syscall.SysProcAttr{}
		}
		c.SysProcAttr.UseCgroupFD, c.SysProcAttr.CgroupFD = true, int(f.Fd())
	}
}
