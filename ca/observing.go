package ca

import (
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/ca/nodeapi"
	"github.com/signet-id/signet/ca/observations"
)

// Observations says for how long it is known what enforcement points decided, in files of this CA (data_dir/observations).
// They name who called whom, and paths of HTTP requests unless the agents' configuration has observations.paths: off.
type Observations struct {
	// Disable takes no observations: signet why-denied and signet policy report do not work, and no roll-out of policies is
	// rolled back by itself.
	Disable bool `yaml:"disable"`
	// Keep is for how long. Default 168h; 1h to 2160h.
	Keep time.Duration `yaml:"keep"`
	// MaxRecords is how many records are kept at most, each of about half a kilobyte, in memory and on disk. Default 100000;
	// 1000 to 5000000.
	MaxRecords int `yaml:"max_records"`
}

const (
	minKeepObservations, maxKeepObservations = time.Hour, 90 * 24 * time.Hour
	minObservations, maxObservations         = 1000, 5_000_000
)

func (o *Observations) check(bad func(field, format string, args ...any)) {
	if o.Keep == 0 {
		o.Keep = observations.DefaultKeep
	}
	if o.Keep < minKeepObservations || o.Keep > maxKeepObservations {
		bad("observations.keep", "%v is not between %v and %v", o.Keep, minKeepObservations, maxKeepObservations)
	}
	if o.MaxRecords == 0 {
		o.MaxRecords = observations.DefaultMaxRecords
	}
	if o.MaxRecords < minObservations || o.MaxRecords > maxObservations {
		bad("observations.max_records", "%d is not between %d and %d", o.MaxRecords, minObservations, maxObservations)
	}
}

// openObservations reads what is kept. That it cannot be is no reason not to issue.
func (ca *CA) openObservations() {
	c := ca.c.Observations
	if c.Disable {
		return
	}
	var err error
	ca.observations, err = observations.Open(observations.Config{Dir: filepath.Join(ca.c.DataDir, "observations"), Keep: c.Keep, MaxRecords: c.MaxRecords,
		Observed: ca.observed, Now: ca.c.Now, Log: ca.log})
	if err != nil {
		ca.log.Error("observations of earlier runs are not available, and those to come are kept in memory alone", "err", err)
	}
}

// observed is told of each decision that an agent reports. It must not block.
func (ca *CA) observed(o *policyv1.Observation) {
	for _, f := range ca.observers {
		f(o)
	}
}

// The doors know an interface, in which a nil pointer would not be nil.

func (ca *CA) observationsOfNodes() nodeapi.Observations {
	if ca.observations == nil {
		return nil
	}
	return ca.observations
}

func (ca *CA) observationsForAdmins() adminapi.Observations {
	if ca.observations == nil {
		return nil
	}
	return ca.observations
}

// observationMetrics are numbers of what is observed.
func (m *metrics) observationMetrics() []prometheus.Collector {
	number := func(f func(observations.Stats) float64) func() float64 {
		return func() float64 {
			if m.ca.observations == nil {
				return 0
			}
			return f(m.ca.observations.Stats())
		}
	}
	counter := func(name, help string, f func(observations.Stats) float64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, number(f))
	}
	gauge := func(name, help string, f func(observations.Stats) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, number(f))
	}
	return []prometheus.Collector{
		counter("signet_ca_observations_total", "Decisions of enforcement points that agents reported.", func(s observations.Stats) float64 { return float64(s.Accepted) }),
		counter("signet_ca_observations_refused_total", "Observations that were malformed, or about a service that their agent may not serve.", func(s observations.Stats) float64 { return float64(s.Refused) }),
		counter("signet_ca_observations_dropped_total", "Decisions that agents had no room for.", func(s observations.Stats) float64 { return float64(s.Dropped) }),
		counter("signet_ca_observations_unsaved_total", "Records of observations that could not be written: a restart forgets them.", func(s observations.Stats) float64 { return float64(s.Unsaved) }),
		gauge("signet_ca_observations", "Records of observations that are kept.", func(s observations.Stats) float64 { return float64(s.Records) }),
		gauge("signet_ca_observations_bytes", "Bytes of the files that hold them.", func(s observations.Stats) float64 { return float64(s.Bytes) }),
	}
}
