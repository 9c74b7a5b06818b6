package ca

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

// adminConn returns a connection to the port as an admin by entry.
func (h *harness) adminConn(path string) *grpc.ClientConn {
	h.t.Helper()
	e := entry(path, "unix:uid:1")
	e.Admin = true
	if r, err := entryv1.NewEntryClient(h.admin).BatchCreateEntry(h.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}}); err != nil || r.Results[0].Status.Code != 0 {
		h.t.Fatal(r, err)
	}
	conn, _ := h.mint("spiffe://example.org" + path)
	return conn
}

// A lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestLoggerSetsResetsAndSurvivesReload(t *testing.T) {
	c := config(t.TempDir())
	c.Logging.Level = "warn"
	h := start(t, c)
	api := loggerv1.NewLoggerClient(h.admin)
	want := func(what string, got *types.Logger, err error, current, launch types.LogLevel) {
		t.Helper()
		if err != nil || got.CurrentLevel != current || got.LaunchLevel != launch {
			t.Errorf("%s: %v %v; want %v, at launch %v", what, got, err, current, launch)
		}
	}
	get := func() (*types.Logger, error) { return api.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{}) }
	set := func(l types.LogLevel) (*types.Logger, error) {
		return api.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: l})
	}
	got, err := get()
	want("at first", got, err, types.LogLevel_WARN, types.LogLevel_WARN)
	for spire, std := range map[types.LogLevel]slog.Level{types.LogLevel_PANIC: slog.LevelError + 8, types.LogLevel_FATAL: slog.LevelError + 4, types.LogLevel_ERROR: slog.LevelError,
		types.LogLevel_WARN: slog.LevelWarn, types.LogLevel_INFO: slog.LevelInfo, types.LogLevel_DEBUG: slog.LevelDebug, types.LogLevel_TRACE: slog.LevelDebug - 4} {
		got, err := set(spire)
		want("set", got, err, spire, types.LogLevel_WARN)
		if h.ca.level.Level() != std {
			t.Errorf("%v is %v in the log, want %v", spire, h.ca.level.Level(), std)
		}
	}
	for _, l := range []types.LogLevel{types.LogLevel_UNSPECIFIED, 8, -1} {
		if _, err := set(l); code(err) != codes.InvalidArgument {
			t.Errorf("level %v: %v", l, err)
		}
	}
	got, err = api.ResetLogLevel(t.Context(), &loggerv1.ResetLogLevelRequest{})
	want("reset", got, err, types.LogLevel_WARN, types.LogLevel_WARN)
	// A reload that does not change the level keeps what was set; one that does brings the new level into force.
	got, err = set(types.LogLevel_DEBUG)
	want("set", got, err, types.LogLevel_DEBUG, types.LogLevel_WARN)
	reload := func(level string) {
		t.Helper()
		now := c
		now.Logging.Level = level
		if _, err := h.ca.Reload(now); err != nil {
			t.Fatal(err)
		}
	}
	reload("warn")
	got, err = get()
	want("reloaded without a change", got, err, types.LogLevel_DEBUG, types.LogLevel_WARN)
	reload("error")
	got, err = get()
	want("reloaded with another level", got, err, types.LogLevel_ERROR, types.LogLevel_ERROR)
	if n := len(h.audit("logger.set")); n < 9 {
		t.Errorf("%d audit records of logger.set", n)
	}
}

func TestDebugInfo(t *testing.T) {
	h := start(t, config(t.TempDir()))
	h.agent()
	h.apply("kind: Identity\nname: web\nspiffeID: /web\nmatch: [\"unix:uid:1\"]\n")
	wantCodes(t, "bundle", createBundles(t, bundlev1.NewBundleClient(h.admin), newPartner(t, "partner.example").proto()), codes.OK)
	r, err := debugv1.NewDebugClient(h.admin).GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if r.AgentsCount != 1 || r.EntriesCount != 1 || r.FederatedBundlesCount != 1 || r.Uptime < 0 || r.Uptime > 600 {
		t.Errorf("info: %v", r)
	}
	if len(r.SvidChain) < 2 || r.SvidChain[0].Id.Path != "/spire/server" || r.SvidChain[0].ExpiresAt <= time.Now().Unix() || r.SvidChain[1].Id.Path != "" || r.SvidChain[1].Subject == "" || r.SvidChain[1].ExpiresAt <= r.SvidChain[0].ExpiresAt {
		t.Errorf("SVID chain: %v", r.SvidChain)
	}
}

// What is about the process, and not about the trust domain, is answered on the admin socket alone. [SPIRE-PROTOCOL §10]
func TestProcessServicesAreForTheAdminSocket(t *testing.T) {
	h := start(t, config(t.TempDir()))
	for who, conn := range map[string]*grpc.ClientConn{"anyone": h.dial(nil, nil), "an agent": h.agent().conn, "an admin by SVID": h.adminConn("/ops"), "": h.admin} {
		want := codes.PermissionDenied
		if who == "" {
			who, want = "the admin socket", codes.OK
		}
		health, herr := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
		_, lerr := loggerv1.NewLoggerClient(conn).GetLogger(t.Context(), &loggerv1.GetLoggerRequest{})
		_, serr := loggerv1.NewLoggerClient(conn).ResetLogLevel(t.Context(), &loggerv1.ResetLogLevelRequest{})
		_, derr := debugv1.NewDebugClient(conn).GetInfo(t.Context(), &debugv1.GetInfoRequest{})
		for rpc, err := range map[string]error{"Health": herr, "GetLogger": lerr, "ResetLogLevel": serr, "GetInfo": derr} {
			if code(err) != want {
				t.Errorf("%s by %s: %v, want %v", rpc, who, err, want)
			}
		}
		if want == codes.OK && health.GetStatus() != healthv1.HealthCheckResponse_SERVING {
			t.Errorf("health: %v", health)
		}
	}
	if _, err := healthv1.NewHealthClient(h.admin).Check(t.Context(), &healthv1.HealthCheckRequest{Service: "no.such.Service"}); code(err) != codes.NotFound {
		t.Errorf("health of an unknown service: %v", err)
	}
}

// The level that was set is the one by which lines are written.
func TestLogLevelDecidesWhatIsWritten(t *testing.T) {
	h := start(t, config(t.TempDir()))
	out := &lockedBuffer{}
	log := slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: h.ca.level}))
	api := loggerv1.NewLoggerClient(h.admin)
	for _, step := range []struct {
		level types.LogLevel
		line  string
		there bool
	}{{types.LogLevel_INFO, "one", false}, {types.LogLevel_DEBUG, "two", true}, {types.LogLevel_PANIC, "three", false}} {
		if _, err := api.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: step.level}); err != nil {
			t.Fatal(err)
		}
		log.Debug(step.line)
		if strings.Contains(out.String(), step.line) != step.there {
			t.Errorf("at %v a debug line is written: %t, want %t", step.level, !step.there, step.there)
		}
	}
}
