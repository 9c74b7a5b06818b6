package envoy

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/test/envoycheck"
)

const webPolicy = `kind: CallPolicy
name: web
service: /web
allow:
  - from: [/caller]
    http: [{methods: [GET], paths: [/v1/**]}]
  - from: [/caller]
    grpc: [shop.v1.Shop/Buy]
  - from: [/tls]
deny:
  - from: [/caller]
    http: [{methods: [DELETE]}]
---
kind: CallPolicy
name: db
service: /db
allow:
  - from: [/caller]
`

// mint returns an X509-SVID of the path, valid for an hour.
func (n *node) mint(path string) *x509.Certificate {
	n.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		n.t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{n.ID(path).URL()}}, key)
	if err != nil {
		n.t.Fatal(err)
	}
	answer, err := svidv1.NewSVIDClient(n.AdminConn()).MintX509SVID(bounded(n.t), &svidv1.MintX509SVIDRequest{Csr: csr})
	if err != nil {
		n.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(answer.GetSvid().GetCertChain()[0])
	if err != nil {
		n.t.Fatal(err)
	}
	return cert
}

func (n *node) check(c envoycheck.Call) envoycheck.Reply {
	n.t.Helper()
	resp, err := authv3.NewAuthorizationClient(n.conn).Check(bounded(n.t), c.Request())
	if err != nil {
		n.t.Fatal(err)
	}
	if err := resp.Validate(); err != nil {
		n.t.Errorf("Envoy would refuse the answer: %v", err)
	}
	return c.Answer(resp, nil)
}

// settled asks until the agent has what was applied: the call gets the answer that is waited for.
func (n *node) settled(c envoycheck.Call, passed bool) {
	n.t.Helper()
	ctx := bounded(n.t)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for n.check(c).Passed != passed {
		select {
		case <-ctx.Done():
			n.t.Fatalf("%s %s never gets the answer %t", c.Method, c.Path, passed)
		case <-tick.C:
		}
	}
}

func TestExtAuthz(t *testing.T) {
	n := start(t)
	n.Apply(webPolicy)
	n.identity("web")
	web, caller, stranger, overTLS := n.mint("/web"), n.mint("/caller"), n.mint("/stranger"), n.mint("/tls")
	get := envoycheck.Call{Peer: caller, Local: web, Method: "GET", Path: "/v1/things?q=1", Authority: "web.internal", RawHeaders: true}
	n.settled(get, true)
	with := func(change func(*envoycheck.Call)) envoycheck.Call {
		c := get
		change(&c)
		return c
	}
	rpc := func(c *envoycheck.Call) {
		c.Method, c.Path, c.Header = "POST", "/shop.v1.Shop/Buy", []envoycheck.Field{{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}}
	}
	for _, tt := range []struct {
		name   string
		call   envoycheck.Call
		passes bool
		reason string // what a refused caller is told
	}{
		{"allowed", get, true, ""},
		{"with headers joined", with(func(c *envoycheck.Call) { c.RawHeaders = false }), true, ""},
		{"another caller", with(func(c *envoycheck.Call) { c.Peer = stranger }), false, "denied"},
		{"another method", with(func(c *envoycheck.Call) { c.Method = "POST" }), false, "denied"},
		{"another path", with(func(c *envoycheck.Call) { c.Path = "/v2/things" }), false, "denied"},
		{"a dot segment", with(func(c *envoycheck.Call) { c.Path = "/v1/a/../../v2" }), false, "path_refused"},
		{"an encoded slash", with(func(c *envoycheck.Call) { c.Path = "/v1/a%2Fb" }), false, "path_refused"},
		{"a byte that is not UTF-8", with(func(c *envoycheck.Call) { c.Path = "/v1/a\xffb" }), false, "path_refused"},
		{"a byte that is not UTF-8, in joined headers", with(func(c *envoycheck.Call) { c.Path, c.RawHeaders = "/v1/a\xffb", false }), false, "path_refused"},
		{"an exclamation mark", with(func(c *envoycheck.Call) { c.Path = "/v1/a!b" }), true, ""},
		{"a method override where a deny lists methods", with(func(c *envoycheck.Call) {
			c.Header = []envoycheck.Field{{Name: "X-HTTP-Method-Override", Value: "DELETE"}}
		}), false, "method_override_refused"},
		{"gRPC", with(rpc), true, ""},
		{"gRPC with two content types", with(func(c *envoycheck.Call) {
			rpc(c)
			c.Header = append(c.Header, envoycheck.Field{Name: "content-type", Value: "application/json"})
		}), false, "denied"},
		{"no certificate", with(func(c *envoycheck.Call) { c.Peer = nil }), false, "svid_refused"},
		{"a filter that does not send it", with(func(c *envoycheck.Call) { c.NoCertificate = true }), false, "svid_refused"},
		{"identity in headers", with(func(c *envoycheck.Call) {
			c.Peer = stranger
			c.Header = []envoycheck.Field{{Name: "x-forwarded-client-cert", Value: "URI=spiffe://example.org/caller"}, {Name: "spiffe-id", Value: "spiffe://example.org/caller"}}
			c.Extensions = map[string]string{"source.principal": "spiffe://example.org/caller", "spiffe_id": "spiffe://example.org/caller"}
		}), false, "denied"},
		{"a destination that is not its own", with(func(c *envoycheck.Call) { c.Local = n.mint("/db") }), false, "denied"},
		{"no certificate of its own", with(func(c *envoycheck.Call) { c.Local = nil }), true, ""},
		{"a connection", envoycheck.Call{Peer: overTLS, Local: web, TCP: true}, true, ""},
		{"a connection of who may only send some requests", envoycheck.Call{Peer: caller, Local: web, TCP: true}, false, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reply := n.check(tt.call)
			if reply.Passed != tt.passes {
				t.Fatalf("passed %t, want %t: %+v", reply.Passed, tt.passes, reply)
			}
			if tt.reason == "" {
				return
			}
			id := reply.Header.Get("Signet-Decision-Id")
			if id == "" {
				t.Error("there is no decision id")
			}
			if reply.GRPCStatus == codes.OK {
				var body struct {
					DecisionID string `json:"decision_id"`
					Reason     string `json:"reason"`
				}
				if err := json.Unmarshal([]byte(reply.Body), &body); err != nil || body.DecisionID != id || body.Reason != tt.reason {
					t.Errorf("body %q, %v; want the decision %s and the reason %s", reply.Body, err, id, tt.reason)
				}
				if reply.Status != http.StatusForbidden || reply.Header.Get("content-type") != "application/json" {
					t.Errorf("status %d, content type %q", reply.Status, reply.Header.Get("content-type"))
				}
			}
			if log := n.log.String(); !strings.Contains(log, "decision_id="+id) {
				t.Errorf("the decision is not in the agent's log")
			}
		})
	}
	t.Run("a refused gRPC call", func(t *testing.T) {
		reply := n.check(with(func(c *envoycheck.Call) { rpc(c); c.Peer = stranger }))
		id := reply.Header.Get("Signet-Decision-Id")
		if reply.GRPCStatus != codes.PermissionDenied || reply.Header.Get("content-type") != "application/grpc" || id == "" || !strings.Contains(reply.Header.Get("grpc-message"), id) {
			t.Fatalf("the client gets %+v", reply)
		}
		raw, err := base64.RawStdEncoding.DecodeString(reply.Header.Get("grpc-status-details-bin"))
		if err != nil {
			t.Fatal(err)
		}
		var s rpcstatus.Status
		var info errdetails.ErrorInfo
		if err := proto.Unmarshal(raw, &s); err != nil || s.Code != int32(codes.PermissionDenied) || len(s.Details) != 1 {
			t.Fatalf("details %v, %v", &s, err)
		}
		if err := s.Details[0].UnmarshalTo(&info); err != nil || info.Metadata["decision_id"] != id || info.Reason != "DENIED" || info.Domain != "signet" {
			t.Errorf("detail %v, %v", &info, err)
		}
	})
	t.Run("a decision id of the caller's own is taken away", func(t *testing.T) {
		reply := n.check(with(func(c *envoycheck.Call) { c.Header = []envoycheck.Field{{Name: "Signet-Decision-Id", Value: "x"}} }))
		if !reply.Passed || len(reply.Removed) != 1 || reply.Removed[0] != "signet-decision-id" {
			t.Errorf("the call goes on as %+v", reply)
		}
	})
}

// TestExtAuthzChoosesAmongItsOwn: a process of several identities says by its certificate which of them is called.
func TestExtAuthzChoosesAmongItsOwn(t *testing.T) {
	n := start(t)
	n.Apply(webPolicy)
	n.identity("web")
	n.identity("db")
	web, db, other, caller := n.mint("/web"), n.mint("/db"), n.mint("/other"), n.mint("/caller")
	post := envoycheck.Call{Peer: caller, Local: db, Method: "POST", Path: "/query", RawHeaders: true}
	n.settled(post, true)
	post.Local = web
	n.settled(post, false) // and not because of an ID that is not there yet: see the log below
	for _, local := range []*x509.Certificate{other, nil} {
		post.Local = local
		if reply := n.check(post); reply.Passed {
			t.Errorf("a call to %v passes", local)
		}
	}
	for _, want := range []string{"its own are spiffe://example.org/", "does not say which is called"} {
		if !strings.Contains(n.log.String(), want) {
			t.Errorf("the log does not say %q", want)
		}
	}
}

// TestExtAuthzFollows: what is applied is in force on a connection that asks all the time, and a process without an
// identity is no Envoy of ours.
func TestExtAuthzFollows(t *testing.T) {
	n := start(t, func(c *agent.Config) { c.RegistrationWait = 10 * time.Millisecond })
	caller := n.mint("/caller")
	call := envoycheck.Call{Peer: caller, Method: "GET", Path: "/v1/x", RawHeaders: true}
	_, err := authv3.NewAuthorizationClient(n.conn).Check(bounded(t), call.Request())
	wantCode(t, err, codes.PermissionDenied, "no registration entry")

	n.identity("web")
	n.settled(call, false) // no policy names it
	n.Apply(webPolicy)
	n.settled(call, true)
	n.Apply("kind: CallPolicy\nname: web\nservice: /web\nallow:\n  - from: [/caller]\ndeny:\n  - from: [/caller]\n    http: [{paths: [/v1/**]}]\n")
	n.settled(call, false)
	call.Path = "/v2"
	n.settled(call, true)
	n.Apply(fmt.Sprintf("kind: Revocation\nname: stolen\nserial: \"%x\"\n", caller.SerialNumber))
	n.settled(call, false)
	n.Delete("Revocation", "stolen")
	n.settled(call, true)
	n.Delete("Identity", "web")
	ctx := bounded(t)
	for {
		_, err := authv3.NewAuthorizationClient(n.conn).Check(ctx, call.Request())
		if err != nil {
			wantCode(t, err, codes.PermissionDenied, "no registration entry")
			break
		}
	}
	if got := n.metric(`signet_agent_ext_authz_decisions_total{answer="denied",reason="denied"}`); got == "0" {
		t.Error("denials are not counted")
	}
}

// checkEnv makes the test binary an Envoy that changes its user between its checks, on one connection.
const checkEnv = "SIGNET_TEST_CHECK"

// checkingChild asks once for each line that it reads, and is another user from the second on.
func checkingChild(socket string) int {
	err := func() error {
		raw, err := base64.StdEncoding.DecodeString(os.Getenv(checkEnv))
		if err != nil {
			return err
		}
		var req authv3.CheckRequest
		if err := proto.Unmarshal(raw, &req); err != nil {
			return err
		}
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer conn.Close()
		in := bufio.NewScanner(os.Stdin)
		for i := 0; in.Scan(); i++ {
			if i == 1 {
				if err := syscall.Seteuid(otherUID); err != nil {
					return err
				}
			}
			resp, err := authv3.NewAuthorizationClient(conn).Check(context.Background(), &req)
			fmt.Println(codes.Code(resp.GetStatus().GetCode()), status.Code(err))
		}
		return in.Err()
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 1
	}
	return 0
}

// TestExtAuthzLooksAgain: an Envoy that becomes another user is, from its next check on, judged as what it is then, on the
// connection that it had.
func TestExtAuthzLooksAgain(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to have a process that changes its user")
	}
	n := start(t)
	n.Apply(webPolicy)
	n.Apply(document("web", 0))
	n.Apply(document("db", otherUID))
	call := envoycheck.Call{Peer: n.mint("/caller"), Method: "GET", Path: "/v1/x", RawHeaders: true}
	n.settled(call, true)
	raw, err := proto.Marshal(envoycheck.Call{Peer: call.Peer, Local: n.mint("/web"), Method: "GET", Path: "/v1/x", RawHeaders: true}.Request())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(bounded(t), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+n.AgentSocket(), checkEnv+"="+base64.StdEncoding.EncodeToString(raw))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for i, want := range []string{"OK OK", "PermissionDenied OK"} { // as /db it may not show the certificate of /web
		if _, err := fmt.Fprintln(in); err != nil {
			t.Fatal(err)
		}
		if !lines.Scan() || lines.Text() != want {
			t.Errorf("check %d is answered %q (%v), want %q", i, lines.Text(), lines.Err(), want)
		}
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestExtAuthzHeader: no security header is asked for, unless the configuration wants it everywhere.
func TestExtAuthzHeader(t *testing.T) {
	n := start(t, func(c *agent.Config) { c.RequireHeaderEverywhere = true })
	_, err := authv3.NewAuthorizationClient(n.conn).Check(bounded(t), envoycheck.Call{}.Request())
	wantCode(t, err, codes.InvalidArgument, "workload.spiffe.io")
}

func TestExtAuthzDisabled(t *testing.T) {
	n := start(t, func(c *agent.Config) { c.ExtAuthz.Disabled = true })
	_, err := authv3.NewAuthorizationClient(n.conn).Check(bounded(t), envoycheck.Call{}.Request())
	wantCode(t, err, codes.Unimplemented)
}

// TestExtAuthzBounds: checks have a bound of their own, far above that of other calls, and a check that is too large is
// refused.
func TestExtAuthzBounds(t *testing.T) {
	n := start(t, func(c *agent.Config) { c.MaxCallsPerSecond, c.ExtAuthz.MaxChecksPerSecond = 1, 20 })
	n.Apply(webPolicy)
	n.identity("web")
	call := envoycheck.Call{Peer: n.mint("/caller"), Method: "GET", Path: "/v1/x", RawHeaders: true}
	client := authv3.NewAuthorizationClient(n.conn)
	ctx := bounded(t)
	answered := 0
	for {
		_, err := client.Check(ctx, call.Request())
		if err != nil {
			wantCode(t, err, codes.ResourceExhausted)
			break
		}
		answered++
	}
	if answered < 50 { // five seconds' worth are 100; those of other calls would be 5
		t.Errorf("%d checks were answered", answered)
	}
}

// TestExtAuthzConcurrent asks from many goroutines while policies change; each answer is one of the two that were ever
// true.
func TestExtAuthzConcurrent(t *testing.T) {
	n := start(t, func(c *agent.Config) { c.ExtAuthz.MaxChecksPerSecond = -1 })
	n.Apply(webPolicy)
	n.identity("web")
	caller := n.mint("/caller")
	always := envoycheck.Call{Peer: caller, Method: "GET", Path: "/v1/x", RawHeaders: true}
	never := envoycheck.Call{Peer: caller, Method: "PUT", Path: "/v1/x", RawHeaders: true}
	n.settled(always, true)
	ctx, stop := context.WithCancel(bounded(t))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			client := authv3.NewAuthorizationClient(dial(t, n.AgentSocket()))
			for ctx.Err() == nil {
				for _, c := range []envoycheck.Call{always, never} {
					resp, err := client.Check(context.WithoutCancel(ctx), c.Request())
					if err != nil {
						t.Error(err)
						return
					}
					if passed := c.Answer(resp, nil).Passed; passed != (c.Method == "GET") {
						t.Errorf("%s passes: %t", c.Method, passed)
						return
					}
				}
			}
		})
	}
	for i := range 10 {
		n.Apply(webPolicy + fmt.Sprintf("---\nkind: CallPolicy\nname: more\nservice: /web\nallow:\n  - from: [/nobody-%d]\n", i))
		n.identity("web", fmt.Sprintf("x509TTL: %dm", 60-i))
	}
	stop()
	wg.Wait()
}
