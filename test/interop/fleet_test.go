package interop

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// A server is what agents attest to: signet's CA or a SPIRE server. The same stock command line administers both.
type server struct {
	*process
	dir    string
	addr   string
	socket string // of admins
	cli    string // the stock spire-server
	conn   *grpc.ClientConn
}

// startCA starts signet's CA as a process. extra is added to its configuration.
func startCA(t *testing.T, ctx context.Context, extra string) *server {
	t.Helper()
	dir := shortDir(t)
	s := &server{dir: dir, addr: freePort(t), socket: dir + "/admin/ca.sock", cli: os.Getenv(envServer)}
	config := writeFile(t, dir+"/ca.yaml", fmt.Sprintf("trust_domain: %s\nlisten: %s\ndata_dir: %s/ca\nadmin_socket: {path: %s}\nseal: {key_file: %s/seal.key, create: true}\naudit: {reserve_bytes: 2097152}\n%s",
		trustDomain, s.addr, dir, s.socket, dir, extra))
	s.process = signetDaemon(t, "signet ca", "ca", "run", "--config", config)
	s.up(ctx)
	return s
}

// startSPIREServer starts an unmodified SPIRE server. extra goes into its server section.
func startSPIREServer(t *testing.T, ctx context.Context, extra, plugins string) *server {
	t.Helper()
	bin := foreign(t, envServer)
	dir := shortDir(t)
	s := &server{dir: dir, addr: freePort(t), socket: dir + "/private/api.sock", cli: bin}
	host, port, _ := net.SplitHostPort(s.addr)
	config := writeFile(t, dir+"/server.conf", fmt.Sprintf(`server {
  bind_address = %q
  bind_port = %q
  socket_path = %q
  trust_domain = %q
  data_dir = %q
  log_level = "DEBUG"
  %s
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = %q } }
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "disk" { plugin_data { keys_path = %q } }
  %s
}
`, host, port, s.socket, trustDomain, dir+"/data", extra, dir+"/data/db.sqlite3", dir+"/data/keys.json", plugins))
	if err := os.MkdirAll(dir+"/data", 0o755); err != nil {
		t.Fatal(err)
	}
	s.process = daemon(t, "spire-server", bin, "run", "-config", config)
	s.up(ctx)
	return s
}

// up starts the server and waits for its admin socket to answer.
func (s *server) up(ctx context.Context) {
	s.t.Helper()
	s.start()
	if s.conn == nil {
		var err error
		if s.conn, err = grpc.NewClient("unix://"+s.socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { s.conn.Close() })
	}
	if err := eventually(ctx, func() error {
		if !s.running() {
			s.t.Fatalf("%s ended: %v", s.name, s.err)
		}
		_, err := s.signet(ctx, "bundle", "show", "--format", "pem")
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
}

// signet runs our command line against the server, whichever it is.
func (s *server) signet(ctx context.Context, args ...string) (string, error) {
	return run(ctx, []string{asSignet + "=1"}, append(append([]string{os.Args[0]}, args...), "--socket", s.socket)...)
}

// spire runs the stock command line against the server, whichever it is. Its verbs are two words or three; the flag of
// the socket follows them.
func (s *server) spire(ctx context.Context, args ...string) (string, error) {
	verbs := 0
	for verbs < len(args) && !strings.HasPrefix(args[verbs], "-") {
		verbs++
	}
	all := append([]string{s.cli}, args[:verbs]...)
	all = append(all, "-socketPath", s.socket)
	return run(ctx, nil, append(all, args[verbs:]...)...)
}

// spireJSON is spire with -output json, decoded.
func (s *server) spireJSON(t *testing.T, ctx context.Context, args ...string) map[string]any {
	t.Helper()
	out, err := s.spire(ctx, append(args, "-output", "json")...)
	if err != nil {
		t.Fatal(err)
	}
	var v map[string]any
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return v
}

// bundleFile writes the server's bundle for an agent to bootstrap from.
func (s *server) bundleFile(ctx context.Context) string {
	s.t.Helper()
	return writeFile(s.t, filepath.Join(s.dir, "bundle.pem"), must[string](s.t)(s.signet(ctx, "bundle", "show", "--format", "pem")))
}

// joinToken asks for a join token in SPIRE's way. With alias, the node gets that ID as well.
func (s *server) joinToken(ctx context.Context, alias string) (token, agentID string) {
	s.t.Helper()
	args := []string{"token", "generate", "-ttl", "600"}
	if alias != "" {
		args = append(args, "-spiffeID", "spiffe://"+trustDomain+alias)
	}
	var v struct{ Value string }
	out := must[string](s.t)(s.spire(ctx, append(args, "-output", "json")...))
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Value == "" {
		s.t.Fatalf("token generate: %v in %s", err, out)
	}
	return v.Value, "spiffe://" + trustDomain + "/spire/agent/join_token/" + v.Value
}

// entry creates a registration entry by SPIRE's command line and returns its ID.
func (s *server) entry(ctx context.Context, id, parent string, flags ...string) string {
	s.t.Helper()
	if !slices.Contains(flags, "-selector") {
		flags = append(flags, "-selector", self())
	}
	v := s.spireJSON(s.t, ctx, append([]string{"entry", "create", "-spiffeID", "spiffe://" + trustDomain + id, "-parentID", full(parent)}, flags...)...)
	results, _ := v["results"].([]any)
	if len(results) != 1 {
		s.t.Fatalf("entry create: %v", v)
	}
	e, _ := results[0].(map[string]any)["entry"].(map[string]any)
	entryID, _ := e["id"].(string)
	if entryID == "" {
		s.t.Fatalf("entry create: %v", v)
	}
	return entryID
}

func full(id string) string {
	if strings.HasPrefix(id, "/") {
		return "spiffe://" + trustDomain + id
	}
	return id
}

// An agent serves the Workload API on its socket: signet's or SPIRE's.
type agent struct {
	*process
	dir    string
	socket string
	spire  bool
	bin    string
}

// An agentConfig says how an agent gets in. Of token and attestor exactly one is needed.
type agentConfig struct {
	server   *server
	token    string
	attestor string // SPIRE's NodeAttestor block
	bundle   string // file
	dir      string // of an agent before, whose data and socket this one takes over
	extra    string
	yaml     string // the whole configuration of our agent
}

func (c *agentConfig) directory(t *testing.T) string {
	if c.dir == "" {
		c.dir = shortDir(t)
	}
	return c.dir
}

// newSPIREAgent configures an unmodified SPIRE agent that keeps its keys on disk.
func newSPIREAgent(t *testing.T, c agentConfig) *agent {
	t.Helper()
	bin := foreign(t, envAgent)
	dir := c.directory(t)
	attestor := c.attestor
	token := ""
	if c.token != "" {
		attestor, token = `NodeAttestor "join_token" { plugin_data {} }`, fmt.Sprintf("join_token = %q", c.token)
	}
	host, port, _ := net.SplitHostPort(c.server.addr)
	if err := os.MkdirAll(dir+"/data", 0o755); err != nil {
		t.Fatal(err)
	}
	config := writeFile(t, dir+"/agent.conf", fmt.Sprintf(`agent {
  data_dir = %q
  log_level = "DEBUG"
  server_address = %q
  server_port = %q
  socket_path = %q
  trust_domain = %q
  trust_bundle_path = %q
  %s
  %s
}
plugins {
  %s
  KeyManager "disk" { plugin_data { directory = %q } }
  WorkloadAttestor "unix" { plugin_data {} }
}
`, dir+"/data", host, port, dir+"/agent.sock", trustDomain, c.bundle, token, c.extra, attestor, dir+"/data"))
	a := &agent{dir: dir, socket: dir + "/agent.sock", spire: true, bin: bin}
	a.process = daemon(t, "spire-agent", bin, "run", "-config", config)
	return a
}

// newSignetAgent configures our own agent.
func newSignetAgent(t *testing.T, c agentConfig) *agent {
	t.Helper()
	dir := c.directory(t)
	yaml := c.yaml
	if yaml == "" {
		yaml = fmt.Sprintf("trust_domain: %s\nserver_address: %s\ndata_dir: %s/signet\nsocket_path: %s/agent.sock\njoin_token_file: %s\n%s",
			trustDomain, c.server.addr, dir, dir, writeFile(t, dir+"/token", c.token), c.extra)
	}
	config := writeFile(t, dir+"/agent.yaml", yaml)
	a := &agent{dir: dir, socket: dir + "/agent.sock"}
	a.process = signetDaemon(t, "signet agent", "agent", "run", "--config", config)
	return a
}

// api asks the agent by SPIRE's own client of the Workload API.
func (a *agent) api(ctx context.Context, args ...string) (string, error) {
	bin := a.bin
	if bin == "" {
		bin = os.Getenv(envAgent)
	}
	all := append([]string{bin, "api"}, args[:2]...)
	all = append(all, "-socketPath", a.socket)
	return run(ctx, nil, append(all, args[2:]...)...)
}

func (a *agent) endpoint() string { return "unix://" + a.socket }

// ids fetches which SPIFFE IDs this process gets now.
func (a *agent) ids(ctx context.Context) ([]string, error) {
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(a.endpoint()))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	svids, err := c.FetchX509SVIDs(ctx)
	var out []string
	for _, s := range svids {
		out = append(out, s.ID.Path())
	}
	return out, err
}

// serves waits until the agent gives this process these IDs.
func (a *agent) serves(ctx context.Context, want ...string) {
	a.t.Helper()
	if err := eventually(ctx, func() error {
		if !a.running() {
			a.t.Fatalf("%s ended: %v", a.name, a.err)
		}
		got, err := a.ids(ctx)
		return errors.Join(err, contains(got, want...))
	}); err != nil {
		a.t.Fatalf("%s: %v", a.name, err)
	}
}

// withholds waits until the agent does not give this process an ID any more.
func (a *agent) withholds(ctx context.Context, id string) {
	a.t.Helper()
	if err := eventually(ctx, func() error {
		got, err := a.ids(ctx)
		if err == nil && slices.Contains(got, id) {
			return fmt.Errorf("still gives %s", id)
		}
		return nil
	}); err != nil {
		a.t.Fatalf("%s: %v", a.name, err)
	}
}
