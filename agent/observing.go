package agent

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/observations"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/workloadapi"
)

// Observations says what is told of the decisions that enforcement points on this node make, to the CA and to admins of
// this node: who called whom, what was asked for, and by which rule it was allowed or denied.
type Observations struct {
	// Disable takes no reports: decisions of this node are not known to signet why-denied and signet policy report, no policy
	// is suggested from them, and no roll-out is rolled back because of them.
	Disable bool `yaml:"disable"`
	// Paths is full (default), or off: paths of HTTP requests, which may name people, are not kept and not told. Methods of gRPC
	// are names in programs and always told.
	Paths string `yaml:"paths"`
}

const (
	pathsFull = "full"
	pathsOff  = "off"
)

func (o *Observations) check(bad func(field, format string, args ...any)) {
	switch o.Paths {
	case "":
		o.Paths = pathsFull
	case pathsFull, pathsOff:
	default:
		bad("observations.paths", "%q is not %s or %s", o.Paths, pathsFull, pathsOff)
	}
}

// openObservations makes what takes reports of decisions. It stays nil if they are off.
func (a *Agent) openObservations() {
	c := a.config.Observations
	if c.Disable {
		return
	}
	a.observations = observations.New(observations.Config{Send: a.sendObservations, OmitPaths: c.Paths == pathsOff, Log: a.log, Now: a.config.Now})
}

func (a *Agent) sendObservations(ctx context.Context, observed []*policyv1.Observation, dropped uint64) error {
	err := a.client.ReportObservations(ctx, observed, dropped)
	if errors.Is(err, caclient.ErrNoObservations) {
		return observations.ErrUnwanted
	}
	if invalid, ok := errors.AsType[*caclient.InvalidError](err); ok {
		return &observations.Rejection{Err: invalid}
	}
	return err
}

// observationsOfWorkloads is what the socket hands reports to, which knows an interface, in which a nil pointer would not be nil.
func (a *Agent) observationsOfWorkloads() workloadapi.Observations {
	if a.observations == nil {
		return nil
	}
	return a.observations
}

var (
	descObserved = prometheus.NewDesc("signet_agent_observations_total", "Decisions of enforcement points that were reported to the agent.", nil, nil)
	descHandedOn = prometheus.NewDesc("signet_agent_observations_sent_total", "Decisions that were handed on to the CA.", nil, nil)
	descLost     = prometheus.NewDesc("signet_agent_observations_dropped_total", "Decisions that found no room, or that the CA refused.", nil, nil)
)

// collectObservations shows the counters.
func (a *Agent) collectObservations(ch chan<- prometheus.Metric) {
	var reported, sent, lost uint64
	if a.observations != nil {
		reported, sent, lost = a.observations.Stats()
	}
	for desc, n := range map[*prometheus.Desc]uint64{descObserved: reported, descHandedOn: sent, descLost: lost} {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n))
	}
}
