package workloadattest

import (
	"context"
	"sync"
	"time"

	"github.com/signet-id/signet/spiffe"
	"github.com/signet-id/signet/workloadapi/peer"
)

// A Report is what one method found out about a process.
type Report struct {
	Method    string
	Selectors []spiffe.Selector
	// Err is what it could not find out.
	Err  error
	Took time.Duration
}

// Explain asks every method about the process anew, whatever is remembered about it, and says what each found. Nothing
// is remembered of it. Errors are those of peer.Process.Snapshot.
func (a *Attestor) Explain(ctx context.Context, p *peer.Process) (peer.Snapshot, []Report, error) {
	state, err := p.Snapshot()
	if err != nil {
		return peer.Snapshot{}, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Timeout)
	defer cancel()
	reports := make([]Report, len(a.cfg.Methods))
	var wg sync.WaitGroup
	for i, m := range a.cfg.Methods {
		wg.Go(func() {
			began := time.Now()
			r := &reports[i]
			r.Method = m.Name()
			r.Selectors, r.Err = m.Selectors(ctx, p, state)
			r.Took = time.Since(began)
		})
	}
	wg.Wait()
	return state, reports, nil
}

// Ask asks one method alone about the process, as Explain does.
func (a *Attestor) Ask(ctx context.Context, p *peer.Process, method string) ([]Report, error) {
	for _, m := range a.cfg.Methods {
		if m.Name() == method {
			alone := &Attestor{cfg: a.cfg}
			alone.cfg.Methods = []Method{m}
			_, reports, err := alone.Explain(ctx, p)
			return reports, err
		}
	}
	return nil, nil
}

// Names are the types of selectors that are attested.
func (a *Attestor) Names() []string {
	names := make([]string, len(a.cfg.Methods))
	for i, m := range a.cfg.Methods {
		names[i] = m.Name()
	}
	return names
}
