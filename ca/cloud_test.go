package ca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/smallstep/pkcs7"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/test/cloudtest"
)

// A logBook keeps what the CA logs, down to debug.
type logBook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// startCloud starts a CA with one attestor. At the end no secret may be in its log, audit log or store.
func startCloud(t *testing.T, attestors NodeAttestors, secrets ...string) *harness {
	t.Helper()
	c := config(t.TempDir())
	book := &logBook{}
	c.NodeAttestors, c.Log = attestors, slog.New(slog.NewJSONHandler(book, &slog.HandlerOptions{Level: slog.LevelDebug}))
	h := start(t, c)
	t.Cleanup(func() {
		book.mu.Lock()
		defer book.mu.Unlock()
		if !strings.Contains(book.b.String(), "refused") {
			t.Error("the log has no refusal; is the right one looked at?")
		}
		nowhere(t, "log", book.b.Bytes(), secrets)
		if err := filepath.WalkDir(c.DataDir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			nowhere(t, path, data, secrets)
			return err
		}); err != nil {
			t.Error(err)
		}
	})
	return h
}

func nowhere(t *testing.T, where string, data []byte, secrets []string) {
	t.Helper()
	for _, s := range secrets {
		if bytes.Contains(data, []byte(s)) {
			t.Errorf("%s has the secret %.20s...", where, s)
		}
	}
}

// attempt attests with a payload that needs no challenge.
func (h *harness) attempt(typ string, payload []byte, k *ecdsa.PrivateKey) (*agentv1.AttestAgentResponse_Result, error) {
	return prove(h.t.Context(), h.dial(nil, nil), typ, payload, csr(h.t, k), noAnswer)
}

// A refusedCase is evidence that must not let anybody in.
type refusedCase struct {
	name    string
	payload []byte
	code    codes.Code
	want    string
}

func (h *harness) refuses(typ string, tests []refusedCase) {
	before := len(h.audit("agent.attested"))
	for _, tt := range tests {
		h.t.Run(tt.name, func(t *testing.T) {
			r, err := prove(t.Context(), h.dial(nil, nil), typ, tt.payload, csr(t, key(t)), noAnswer)
			if code(err) != tt.code || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, %v; want %v with %q", r, err, tt.code, tt.want)
			}
		})
	}
	if after := len(h.audit("agent.attested")); after != before {
		h.t.Errorf("%d agents joined", after-before)
	}
	if n := len(h.audit("agent.attest")); n < 1 {
		h.t.Error("the audit log has no refusal")
	}
}

// countsOnce leads evidence that counts once through its life. payload makes it anew each time, of the same node.
func (h *harness) countsOnce(typ, path string, selectors []string, payload func() []byte) {
	t := h.t
	t.Helper()
	k, thief := key(t), key(t)
	first, err := h.attempt(typ, payload(), k)
	if err != nil || first.Svid.Id.Path != path || first.Reattestable {
		t.Fatalf("first: %v, %v; want %s", first, err, path)
	}
	node, err := agentv1.NewAgentClient(h.admin).GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: first.Svid.Id})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(selectors)
	if got := selectorValues(node.Selectors); !slices.Equal(got, selectors) || node.AttestationType != typ || node.CanReattest {
		t.Errorf("the CA holds %v\nwith selectors %q, want %q", node, got, selectors)
	}
	again, err := h.attempt(typ, payload(), k) // as if the reply had been lost
	if err != nil {
		t.Fatalf("the same agent, which did not get the answer: %v", err)
	}
	used := func(when string, k *ecdsa.PrivateKey) {
		t.Helper()
		if _, err := h.attempt(typ, payload(), k); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "already been used") {
			t.Errorf("%s: %v", when, err)
		}
	}
	used("stolen before the first use", thief)
	if err := renew(t.Context(), h, again.Svid, k); err != nil {
		t.Fatal(err)
	}
	used("stolen after the first use", thief)
	used("replayed by the node itself", k)

	agents := agentv1.NewAgentClient(h.admin)
	if _, err := agents.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: first.Svid.Id}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.attempt(typ, payload(), key(t)); err != nil {
		t.Errorf("after an operator evicted the node: %v", err)
	}
	if _, err := agents.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: first.Svid.Id}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.attempt(typ, payload(), k); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "agent is banned") {
		t.Errorf("while banned: %v", err)
	}
	if _, err := adminv1.NewAdminClient(h.admin).UnbanAgent(t.Context(), &adminv1.UnbanAgentRequest{AgentId: "spiffe://example.org" + path}); err != nil {
		t.Fatal(err)
	}
}

// reattests shows evidence twice, for two keys, and the second replaces the first.
func (h *harness) reattests(typ, path string, payload func() []byte) {
	t := h.t
	t.Helper()
	k, k2 := key(t), key(t)
	first, err := h.attempt(typ, payload(), k)
	if err != nil || first.Svid.Id.Path != path || !first.Reattestable {
		t.Fatalf("first: %v, %v; want %s", first, err, path)
	}
	if err := renew(t.Context(), h, first.Svid, k); !strings.Contains(fmt.Sprint(err), "must attest again") {
		t.Errorf("RenewAgent: %v", err)
	}
	if _, err := h.attempt(typ, payload(), k2); err != nil {
		t.Fatalf("again: %v", err)
	}
	if err := renew(t.Context(), h, first.Svid, k); code(err) != codes.PermissionDenied || strings.Contains(err.Error(), "must attest again") {
		t.Errorf("the SVID of before: %v", err)
	}
	agents := agentv1.NewAgentClient(h.admin)
	if _, err := agents.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: first.Svid.Id}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.attempt(typ, payload(), k); code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "agent is banned") {
		t.Errorf("while banned: %v", err)
	}
}

func TestK8sPSAT(t *testing.T) {
	api := cloudtest.NewKubernetes(t)
	cluster := K8sCluster{ServiceAccounts: []string{"signet:agent"}, Kubeconfig: api.Kubeconfig(t), NodeLabels: []string{"zone"}, PodLabels: []string{"app"}}
	h := startCloud(t, NodeAttestors{K8sPSAT: &K8sPSAT{Clusters: map[string]K8sCluster{"prod": cluster}}}, cloudtest.NodeToken, cloudtest.OwnToken)
	payload := func(cluster, token string) []byte {
		return fmt.Appendf(nil, `{"cluster":%q,"token":%q}`, cluster, token)
	}
	good := payload("prod", cloudtest.NodeToken)

	r, err := h.attempt("k8s_psat", good, key(t))
	if err != nil {
		t.Fatal(err)
	}
	node, err := agentv1.NewAgentClient(h.admin).GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: r.Svid.Id})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"k8s_psat:cluster:prod", "k8s_psat:agent_ns:signet", "k8s_psat:agent_sa:agent", "k8s_psat:agent_pod_name:agent-x1", "k8s_psat:agent_pod_uid:pod-uid-1",
		"k8s_psat:agent_node_ip:10.0.0.7", "k8s_psat:agent_node_name:node1", "k8s_psat:agent_node_uid:node-uid-1", "k8s_psat:agent_node_label:zone:a", "k8s_psat:agent_pod_label:app:agent"}
	slices.Sort(want)
	if got := selectorValues(node.Selectors); !slices.Equal(got, want) {
		t.Errorf("selectors %q, want %q", got, want)
	}
	h.refuses("k8s_psat", []refusedCase{
		{"garbage", []byte("{"), codes.InvalidArgument, "failed to attest: "},
		{"other cluster", payload("test", cloudtest.NodeToken), codes.InvalidArgument, `not configured for cluster "test"`},
		{"no token", payload("prod", ""), codes.InvalidArgument, "missing token"},
		{"two tokens", []byte(`{"cluster":"prod","token":"a.b.c","token":"` + cloudtest.NodeToken + `"}`), codes.InvalidArgument, "each once"},
		{"oversized", payload("prod", "a.b."+strings.Repeat("c", nodeattest.MaxPayloadBytes)), codes.InvalidArgument, "malformed param"},
		{"a token that the API server does not take", payload("prod", "a.b.c"), codes.Internal, `with the API of cluster "prod"`},
	})
	h.reattests("k8s_psat", "/spire/agent/k8s_psat/prod/node-uid-1", func() []byte { return good })
}

// What the API server says of the token decides, and its codes are SPIRE's.
func TestK8sPSATVerdicts(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*cloudtest.Kubernetes)
		code   codes.Code
		want   string
	}{
		{"not authenticated, as with another audience or an expired token", func(k *cloudtest.Kubernetes) {
			k.Review = cloudtest.Object(t, `{"authenticated":false,"error":"token `+cloudtest.NodeToken+` is for other audiences"}`)
		}, codes.PermissionDenied, "token not authenticated"},
		{"deleted pod", func(k *cloudtest.Kubernetes) { k.Pod = nil }, codes.PermissionDenied, "does not exist"},
		{"a token that is not bound to a pod", func(k *cloudtest.Kubernetes) { delete(k.Review["user"].(map[string]any), "extra") }, codes.PermissionDenied, "bound to a pod"},
		{"API server without the node", func(k *cloudtest.Kubernetes) { k.Node = nil }, codes.Internal, "unable to get the node"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			api := cloudtest.NewKubernetes(t)
			tt.change(api)
			h := startCloud(t, NodeAttestors{K8sPSAT: &K8sPSAT{Clusters: map[string]K8sCluster{"prod": {ServiceAccounts: []string{"signet:agent"}, Kubeconfig: api.Kubeconfig(t)}}}},
				cloudtest.NodeToken, cloudtest.OwnToken)
			h.refuses("k8s_psat", []refusedCase{{tt.name, []byte(`{"cluster":"prod","token":"` + cloudtest.NodeToken + `"}`), tt.code, tt.want}})
		})
	}
}

func TestAWSIID(t *testing.T) {
	const account, region, instance = "123456789012", "eu-central-1", "i-078517ca8a70a1dde"
	aws, other := cloudtest.NewAWS(t), cloudtest.NewAWS(t)
	config := AWSIID{Accounts: []string{account}, Certificates: map[string]string{region: cloudtest.File(t, aws)}, MaxInstanceAge: 24 * time.Hour}
	document := func(account, instance string, age time.Duration) string {
		return cloudtest.Document(account, region, instance, time.Now().Add(-age))
	}
	good := document(account, instance, time.Hour)
	signed := aws.Sign(t, good)
	payload := cloudtest.Payload(t, good, signed)
	signedPayload := func(document string) []byte { return cloudtest.Payload(t, document, aws.Sign(t, document)) }

	h := startCloud(t, NodeAttestors{AWSIID: &config}, strings.Split(signed, "\n")[5])
	h.refuses("aws_iid", []refusedCase{
		{"garbage", []byte("null"), codes.InvalidArgument, "failed to attest: missing document"},
		{"oversized", cloudtest.Payload(t, strings.Repeat(" ", 20<<10)+good, signed), codes.InvalidArgument, "at most"},
		{"other account", signedPayload(document("210987654321", instance, time.Hour)), codes.PermissionDenied, `account "210987654321"`},
		{"other region", signedPayload(strings.ReplaceAll(good, region, "us-east-1")), codes.PermissionDenied, "region"},
		{"too old", signedPayload(document(account, instance, 25*time.Hour)), codes.PermissionDenied, "launched more than 24h"},
		{"changed", cloudtest.Payload(t, document(account, "i-00000000000000000", time.Hour), signed), codes.InvalidArgument, "failed verification"},
		{"signed by somebody else", cloudtest.Payload(t, good, other.Sign(t, good)), codes.InvalidArgument, "failed verification"},
		{"signed with SHA-1", cloudtest.Payload(t, good, cloudtest.Lines(aws.SignDER(t, good, pkcs7.OIDDigestAlgorithmSHA1))), codes.InvalidArgument, "failed verification"},
		{"only the short signature", []byte(strings.Replace(string(payload), `"rsa2048"`, `"rsa1024"`, 1)), codes.InvalidArgument, "rsa2048 is missing"},
		{"the document twice", []byte(strings.Replace(string(payload), `"document":`, `"document":"{}","document":`, 1)), codes.InvalidArgument, "each once"},
		{"a member of the document twice", signedPayload(strings.Replace(good, `"version"`, `"instanceId" : "i-1", "version"`, 1)), codes.InvalidArgument, "occurs twice"},
	})
	h.countsOnce("aws_iid", "/spire/agent/aws_iid/"+account+"/"+region+"/"+instance, []string{"aws_iid:account_id:" + account, "aws_iid:az:eu-central-1a",
		"aws_iid:image:id:ami-0fa9e1f64142cde17", "aws_iid:instance:id:" + instance, "aws_iid:region:eu-central-1"}, func() []byte { return payload })

	config.AllowReattestation, config.MaxInstanceAge = true, 0
	h = startCloud(t, NodeAttestors{AWSIID: &config})
	h.refuses("aws_iid", []refusedCase{{"garbage", []byte("null"), codes.InvalidArgument, ""}})
	h.reattests("aws_iid", "/spire/agent/aws_iid/"+account+"/"+region+"/"+instance, func() []byte { return payload })
}

func TestGCPIIT(t *testing.T) {
	const project, instance, audience = "shop-prod", "1234567890123456789", "spiffe://example.org"
	google := cloudtest.NewGoogle(t)
	server := httptest.NewTLSServer(google)
	t.Cleanup(server.Close)
	authorities := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(authorities, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	config := GCPIIT{Projects: []string{project}, Audience: audience, KeysURL: server.URL, KeysURLCAFile: authorities}
	now := time.Now()
	claims := cloudtest.Claims(audience, project, instance, now)
	token := func(changes map[string]any) []byte {
		return []byte(google.Token(t, "key-1", cloudtest.With(claims, changes)))
	}
	good := string(token(nil))
	plain, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	public := google.JWKS(t)
	sign := func(alg jose.SignatureAlgorithm, key any, kid string, payload []byte) []byte {
		return []byte(cloudtest.Sign(t, alg, jose.JSONWebKey{Key: key, KeyID: kid}, payload))
	}
	none := "eyJhbGciOiJub25lIiwia2lkIjoia2V5LTEifQ." + strings.Split(good, ".")[1] + "."

	h := startCloud(t, NodeAttestors{GCPIIT: &config}, strings.Split(good, ".")[2])
	h.refuses("gcp_iit", []refusedCase{
		{"garbage", []byte("token"), codes.InvalidArgument, "failed to attest: unable to parse"},
		{"oversized", []byte(good + strings.Repeat("A", 32<<10)), codes.InvalidArgument, "at most"},
		{"alg none", []byte(none), codes.InvalidArgument, "unable to parse"},
		{"HS256 with the public key", sign(jose.HS256, public, "key-1", plain), codes.InvalidArgument, "unable to parse"},
		{"kid unknown", sign(jose.RS256, google.Key("key-1"), "key-9", plain), codes.InvalidArgument, "no key with ID"},
		{"a claim twice", sign(jose.RS256, google.Key("key-1"), "key-1", []byte(strings.Replace(string(plain), `"aud"`, `"aud":"x","aud"`, 1))), codes.InvalidArgument, "signature"},
		{"wrong audience", token(map[string]any{"aud": "spiffe://other.example"}), codes.PermissionDenied, "audience"},
		{"wrong issuer", token(map[string]any{"iss": "https://issuer.example"}), codes.PermissionDenied, "issuer"},
		{"expired", token(map[string]any{"iat": now.Add(-3 * time.Hour).Unix(), "exp": now.Add(-2 * time.Hour).Unix()}), codes.PermissionDenied, "has expired"},
		{"other project", []byte(google.Token(t, "key-1", cloudtest.Machine(t, claims, map[string]any{"project_id": "shop-test"}))), codes.PermissionDenied, "not in the allow list"},
		{"not of an instance", token(map[string]any{"google": nil}), codes.PermissionDenied, "compute_engine"},
	})
	if n := google.Served(); n != 1 {
		t.Errorf("the keys were fetched %d times, want once", n)
	}
	later := func() []byte { // an instance gets a new token each time; it is the same instance
		now = now.Add(time.Second)
		return token(map[string]any{"iat": now.Unix() - 1000, "exp": now.Unix() + 2000})
	}
	h.countsOnce("gcp_iit", "/spire/agent/gcp_iit/"+project+"/"+instance, []string{"gcp_iit:project-id:shop-prod", "gcp_iit:zone:europe-west3-a",
		"gcp_iit:instance-name:web-1", "gcp_iit:sa:12345-compute@developer.gserviceaccount.com"}, later)

	config.AllowReattestation = true
	h = startCloud(t, NodeAttestors{GCPIIT: &config})
	h.refuses("gcp_iit", []refusedCase{{"garbage", []byte("token"), codes.InvalidArgument, ""}})
	h.reattests("gcp_iit", "/spire/agent/gcp_iit/"+project+"/"+instance, func() []byte { return token(nil) })
}

// SPIRE's operators keep the names of their agents.
func TestCloudPathTemplates(t *testing.T) {
	aws, google := cloudtest.NewAWS(t), cloudtest.NewGoogle(t)
	h := startCloud(t, NodeAttestors{
		AWSIID: &AWSIID{Accounts: []string{"123456789012"}, Certificates: map[string]string{"eu-central-1": cloudtest.File(t, aws)}, AgentPathTemplate: "/{{ .PluginName }}/v2/{{ .Region }}/{{ .InstanceID }}"},
		GCPIIT: &GCPIIT{Projects: []string{"shop-prod"}, KeysFile: google.File(t), AgentPathTemplate: "/gcp/{{ .Zone }}/{{ .InstanceName }}/{{ .ServiceAccount }}"},
	})
	document := cloudtest.Document("123456789012", "eu-central-1", "i-1", time.Now())
	claims := cloudtest.Claims("spire-gcp-node-attestor", "shop-prod", "42", time.Now())
	for _, tt := range []struct {
		typ     string
		payload []byte
		want    string
	}{
		{"aws_iid", cloudtest.Payload(t, document, aws.Sign(t, document)), "/spire/agent/aws_iid/v2/eu-central-1/i-1"},
		{"gcp_iit", []byte(google.Token(t, "key-1", claims)), "/spire/agent/gcp/europe-west3-a/web-1/12345-compute_developer.gserviceaccount.com"},
	} {
		if r, err := h.attempt(tt.typ, tt.payload, key(t)); err != nil || r.Svid.Id.Path != tt.want {
			t.Errorf("%s: %v, %v; want %s", tt.typ, r, err, tt.want)
		}
	}
	h.refuses("gcp_iit", []refusedCase{
		{"nothing for the template", []byte(google.Token(t, "key-1", cloudtest.With(claims, map[string]any{"email": nil}))), codes.PermissionDenied, ".ServiceAccount is empty"},
		{"a name that is no segment", []byte(google.Token(t, "key-1", cloudtest.Machine(t, claims, map[string]any{"instance_name": ".."}))), codes.PermissionDenied, "cannot be a SPIFFE ID"},
	})
}

// Mistakes are told at the start, by field.
func TestCloudConfig(t *testing.T) {
	for _, tt := range []struct{ yaml, want string }{
		{"{k8s_psat: {}}", "node_attestors.k8s_psat.clusters: missing"},
		{"{k8s_psat: {clusters: {prod: {}}}}", "node_attestors.k8s_psat.clusters.prod.service_accounts: missing"},
		{"{k8s_psat: {clusters: {prod: {service_accounts: ['a:b'], service_acount: x}}}}", "service_acount"},
		{"{aws_iid: {}}", "node_attestors.aws_iid.accounts: missing"},
		{"{aws_iid: {accounts: [123456789012]}}", "write it in quotes"},
		{"{aws_iid: {accounts: ['123456789012'], certificates: {eu-central-1: a.pem}}}", "node_attestors.aws_iid.certificates.eu-central-1: \"a.pem\" must be absolute"},
		{"{aws_iid: {accounts: ['123456789012'], certificates: {a: /a}, max_instance_age: 1h, allow_reattestation: true}}", "node_attestors.aws_iid.max_instance_age: excludes"},
		{"{aws_iid: {accounts: ['123456789012'], certificates: {a: /a}, agent_path_template: '/aws/{{ .Tags.name }}'}}", "node_attestors.aws_iid.agent_path_template: "},
		{"{gcp_iit: {projects: [a], agent_path_template: '/gcp/{{ .Labels.x }}'}}", "node_attestors.gcp_iit.agent_path_template: "},
		{"{gcp_iit: {}}", "node_attestors.gcp_iit.projects: missing"},
		{"{gcp_iit: {projects: [a], keys_url: 'http://keys'}}", "node_attestors.gcp_iit.keys_url"},
	} {
		_, err := ReadConfig([]byte("trust_domain: example.org\ndata_dir: /d\nseal: {key_file: /k}\nnode_attestors: "+tt.yaml+"\n"), "ca.yaml")
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.yaml, err, tt.want)
		}
	}
	for _, tt := range []struct {
		attestors NodeAttestors
		want      string
	}{
		{NodeAttestors{K8sPSAT: &K8sPSAT{Clusters: map[string]K8sCluster{"prod": {ServiceAccounts: []string{"a:b"}, Kubeconfig: "/absent"}}}}, "node_attestors.k8s_psat.clusters.prod: kubeconfig: "},
		{NodeAttestors{AWSIID: &AWSIID{Accounts: []string{"123456789012"}, Certificates: map[string]string{"eu-central-1": "/absent"}}}, "node_attestors.aws_iid.certificates.eu-central-1: "},
		{NodeAttestors{GCPIIT: &GCPIIT{Projects: []string{"a"}, KeysFile: "/absent"}}, "node_attestors.gcp_iit.keys_file: "},
	} {
		c := config(t.TempDir())
		c.NodeAttestors = tt.attestors
		ca, err := New(context.Background(), c)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("New: %v, want %q", err, tt.want)
		}
		if ca != nil {
			ca.Close()
		}
	}
}
