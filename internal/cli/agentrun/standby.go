package agentrun

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/internal/handover"
)

// standBy waits until the agent that runs with the same data directory has ended, and returns its sockets, and what keeps others from
// taking its place too. Meanwhile it answers /live, and /ready as soon as it may be ended: whoever rolls agents out ends the other one then.
func standBy(ctx context.Context, c agent.Config, log *slog.Logger) (sockets map[string]*os.File, turn *os.File, err error) {
	stop := func() error { return nil }
	sockets, turn, err = handover.Await(ctx, handover.Config{
		Dir: c.DataDir, Log: log,
		Taken:   c.DataDirInUse,
		Waiting: func() { stop = answerProbes(c.Metrics.Listen, log) },
	})
	return sockets, turn, errors.Join(err, stop())
}

// answerProbes says at address, if there is one, that this process lives and is ready, until it is stopped.
func answerProbes(address string, log *slog.Logger) (stop func() error) {
	nothing := func() error { return nil }
	if address == "" {
		return nothing
	}
	l, err := net.Listen("tcp", address)
	if err != nil { // the other agent's, which answers for both
		log.Info("probes are not answered while this agent waits", "metrics_listen", address, "err", err)
		return nothing
	}
	answer := func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok: waits for the agent before this one to end")
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /live", answer)
	mux.HandleFunc("GET /ready", answer)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	return func() error {
		err := server.Close()
		if e := <-served; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
		return err
	}
}

func with(sockets map[string]*os.File, name string, s *os.File) map[string]*os.File {
	out := maps.Clone(sockets)
	if out == nil {
		out = map[string]*os.File{}
	}
	out[name] = s
	return out
}
