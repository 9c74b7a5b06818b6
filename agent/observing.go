package agent

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/observations"
	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/internal/tally"
	"github.com/signet-id/signet/spiffe"
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

// decisions is the service on the admin socket; nil if there is nothing to tell.
func (a *Agent) decisions() agentv1.DecisionsServer {
	if a.observations == nil {
		return nil
	}
	return &decisions{agent: a}
}

// decisions is signet.agent.v1.Decisions.
type decisions struct {
	agentv1.UnimplementedDecisionsServer
	agent *Agent
}

// maxDecisions is how many decisions one answer holds.
const maxDecisions = 1000

// Find returns what is remembered.
func (d *decisions) Find(_ context.Context, req *agentv1.FindDecisionsRequest) (*agentv1.FindDecisionsResponse, error) {
	a := d.agent
	out := &agentv1.FindDecisionsResponse{}
	if id := req.GetDecisionId(); id != "" {
		if req.GetService() != "" || req.GetPeer() != "" || req.GetSince() != nil {
			return nil, status.Error(codes.InvalidArgument, "decision_id excludes service, peer and since")
		}
		out.Decisions = a.observations.Reports(id)
		if len(out.Decisions) == 0 {
			keep, most := a.observations.Keep()
			return nil, status.Errorf(codes.NotFound, "decision %.64q is not known to this agent, which remembers the last %d of its node for %v, and none of before its start at %s",
				id, most, keep, a.started.UTC().Format(time.RFC3339))
		}
	} else {
		f := tally.Filter{Service: req.GetService(), Peer: req.GetPeer(), Limit: min(max(int(req.GetLimit()), 1), maxDecisions)}
		if t := req.GetSince(); t != nil {
			f.Since = t.AsTime()
		}
		out.Decisions = a.observations.Decisions(f)
	}
	if n := len(out.Decisions); n > 0 {
		if service, err := spiffe.ParseWorkloadID(out.Decisions[n-1].GetService()); err == nil {
			out.Policies = a.cache.PolicySet(service)
		}
	}
	if svid := a.node.identity(); svid != nil {
		out.AgentId = svid.ID.String()
	}
	return out, nil
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
