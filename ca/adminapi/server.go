package adminapi

import (
	"context"
	"crypto/x509"
	"log/slog"
	"math"
	"time"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/signet-id/signet/ca/auditlog"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// A LogLevel is how much is logged, now and by configuration. It is for the Logger service.
type LogLevel struct {
	// Current and Configured return the level in force and the one in the configuration.
	Current, Configured func() slog.Level
	Set                 func(slog.Level)
}

// levels are SPIRE's levels in the numbers of log/slog. What is logged as an error is the most serious that there is: a
// level beyond silences everything.
var levels = []struct {
	spire types.LogLevel
	slog  slog.Level
}{
	{types.LogLevel_TRACE, slog.LevelDebug - 4}, {types.LogLevel_DEBUG, slog.LevelDebug}, {types.LogLevel_INFO, slog.LevelInfo}, {types.LogLevel_WARN, slog.LevelWarn},
	{types.LogLevel_ERROR, slog.LevelError}, {types.LogLevel_FATAL, slog.LevelError + 4}, {types.LogLevel_PANIC, slog.LevelError + 8},
}

// spireLevel is the level that lets through what l does. Levels between two let through what the higher does.
func spireLevel(l slog.Level) types.LogLevel {
	for _, x := range levels {
		if l <= x.slog {
			return x.spire
		}
	}
	return types.LogLevel_PANIC
}

func (a *API) logger() *types.Logger {
	return &types.Logger{CurrentLevel: spireLevel(a.c.LogLevel.Current()), LaunchLevel: spireLevel(a.c.LogLevel.Configured())}
}

// GetLogger says how much is logged. [SPIRE-PROTOCOL §14]
func (a *API) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return a.logger(), nil
}

// SetLogLevel changes how much is logged until it is reset, the configuration's level changes, or the CA ends.
func (a *API) SetLogLevel(ctx context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	for _, x := range levels {
		if x.spire == req.NewLevel {
			return a.setLevel(ctx, x.slog)
		}
	}
	return nil, a.toStatus(&registry.ValidationError{Field: "new_level", Value: req.NewLevel.String(), Problem: "is not one of PANIC, FATAL, ERROR, WARN, INFO, DEBUG, TRACE"})
}

// ResetLogLevel goes back to the configured level.
func (a *API) ResetLogLevel(ctx context.Context, _ *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	return a.setLevel(ctx, a.c.LogLevel.Configured())
}

// setLevel records the change first: whoever silences the log leaves a trace of it.
func (a *API) setLevel(ctx context.Context, l slog.Level) (*types.Logger, error) {
	rec := a.record(ctx, "logger.set", "", nil, map[string]any{"level": spireLevel(l).String(), "before": spireLevel(a.c.LogLevel.Current()).String()})
	if err := a.c.Audit.Append(ctx, auditlog.Essential, rec); err != nil {
		return nil, a.toStatus(err)
	}
	a.c.LogLevel.Set(l)
	return a.logger(), nil
}

// GetInfo says what the CA is and has: its own X509-SVID up to the authority, how long it runs, and how much there is of
// everything. [SPIRE-PROTOCOL §14]
func (a *API) GetInfo(context.Context, *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	own, err := a.c.Certificate()
	if err != nil {
		return nil, a.toStatus(err)
	}
	out := &debugv1.GetInfoResponse{Uptime: number(int(max(0, a.c.Now().Sub(a.c.Started)) / time.Second)), FederatedBundlesCount: number(len(a.c.Registry.Bundles()))}
	entries, agents, _ := a.c.Registry.Counts()
	out.EntriesCount, out.AgentsCount = number(entries), number(agents)
	for _, der := range own.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, a.toStatus(err)
		}
		c := &debugv1.GetInfoResponse_Cert{ExpiresAt: cert.NotAfter.Unix(), Subject: cert.Subject.String()}
		if id, err := spiffe.IDFromCertificate(cert); err == nil { // the root of an upstream CA needs none
			c.Id = protoID(id)
		}
		out.SvidChain = append(out.SvidChain, c)
	}
	return out, nil
}

func number(n int) int32 { return int32(min(n, math.MaxInt32)) }
