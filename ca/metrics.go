package ca

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/store"
)

// metrics are for alerts. No SPIFFE ID is ever a label. [DESIGN §10]
type metrics struct {
	ca       *CA
	registry *prometheus.Registry
	svids    *prometheus.CounterVec
	refusals *prometheus.CounterVec
	limited  *prometheus.CounterVec
	leaks    *prometheus.CounterVec
	commits  *prometheus.HistogramVec
}

func newMetrics(ca *CA) *metrics {
	m := &metrics{
		ca:       ca,
		registry: prometheus.NewRegistry(),
		svids: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_ca_svids_total",
			Help: "SVIDs by kind (x509, jwt, agent) and outcome (issued, refused)."}, []string{"kind", "outcome"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_ca_calls_refused_total",
			Help: "Calls turned away before their RPC ran, by reason: agent_banned, agent_expired, ..., or the gRPC code."}, []string{"reason"}),
		limited: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_ca_calls_limited_total",
			Help: "Calls and connections turned away because their caller is over a limit, by its key in the configuration."}, []string{"limit"}),
		leaks: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_ca_leaks_total",
			Help: "Signs that a secret is in wrong hands: superseded_svid, old_key, token_reused, canary_issued, canary_used. Every one is a reason to look."}, []string{"kind"}),
		commits: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "signet_ca_store_seconds",
			Help: "Time of store operations.", Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9)}, []string{"op"}),
	}
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}
	m.registry.MustRegister(m.svids, m.refusals, m.leaks, m.limited, m.commits, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		gauge("signet_ca_entries", "Registration entries.", func() float64 { e, _, _ := m.counts(); return float64(e) }),
		gauge("signet_ca_agents", "Attested agents.", func() float64 { _, n, _ := m.counts(); return float64(n) }),
		gauge("signet_ca_policies", "Call policies.", func() float64 { _, _, p := m.counts(); return float64(p) }),
		gauge("signet_ca_followers", "Agents that follow this replica.", func() float64 {
			if ca.reg == nil {
				return 0
			}
			return float64(ca.reg.Followers())
		}),
		gauge("signet_ca_revision", "Store revision held in memory.", func() float64 {
			if ca.reg == nil {
				return 0
			}
			return float64(ca.reg.Revision())
		}),
		gauge("signet_ca_store_stale_seconds", "For how long it has not been known that all that other replicas committed is in memory; 0 for a single CA.", func() float64 { return ca.staleFor().Seconds() }),
		gauge("signet_ca_follow_lag_revisions", "How far the slowest follower's acknowledgement is behind.", m.lag),
		gauge("signet_ca_upstream_failing", "What the upstream CA does not do at the moment, of: following it, publishing JWT keys, renewing the intermediate.", func() float64 {
			return float64(len(ca.upstream.problems()))
		}),
		gauge("signet_ca_federations", "Federation relationships.", func() float64 { n, _, _ := ca.federationHealth(); return float64(n) }),
		gauge("signet_ca_federations_failing", "Relationships whose bundle could not be fetched the last time.", func() float64 { _, n, _ := ca.federationHealth(); return float64(n) }),
		gauge("signet_ca_federation_age_seconds", "Age of the bundle that was fetched longest ago.", func() float64 { _, _, age := ca.federationHealth(); return age.Seconds() }),
		gauge("signet_ca_healthy", "1 if the CA can do its work.", func() float64 {
			if ca.Health() != nil {
				return 0
			}
			return 1
		}),
	)
	m.registry.MustRegister(m.authorityGauges()...)
	m.registry.MustRegister(m.observationMetrics()...)
	m.registry.MustRegister(clusterMetrics{ca})
	return m
}

// authorityGauges are about the active authority of each kind, and whom the activation of a prepared one waits for.
func (m *metrics) authorityGauges() []prometheus.Collector {
	var out []prometheus.Collector
	for _, kind := range []authority.Kind{authority.KindX509, authority.KindJWT} {
		gauge := func(name, help string, f func(authority.Authority) float64, state authority.State) {
			out = append(out, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: prometheus.Labels{"kind": string(kind)}}, func() float64 {
				if m.ca.set == nil || m.ca.rotator == nil {
					return 0
				}
				for _, a := range m.ca.set.Authorities(kind) {
					if a.State == state {
						return f(a)
					}
				}
				return 0
			}))
		}
		gauge("signet_ca_authority_seconds_left", "Until the end of the active authority.", func(a authority.Authority) float64 {
			return a.NotAfter.Sub(m.ca.c.Now()).Seconds()
		}, authority.StateActive)
		gauge("signet_ca_authority_age_seconds", "Since the begin of the active authority.", func(a authority.Authority) float64 {
			return m.ca.c.Now().Sub(a.NotBefore).Seconds()
		}, authority.StateActive)
		gauge("signet_ca_authority_laggards", "Live agents that have not handed on the prepared authority; 0 if none is prepared.", func(a authority.Authority) float64 {
			return float64(m.ca.rotator.Readiness(a).Count)
		}, authority.StatePrepared)
	}
	return out
}

func (m *metrics) counts() (entries, nodes, policies int) {
	if m.ca.reg == nil {
		return 0, 0, 0
	}
	return m.ca.reg.Counts()
}

// lag is 0 if nobody follows. A follower whom no change concerned acknowledges nothing, so what counts is how far it
// is behind what it was sent.
func (m *metrics) lag() float64 {
	if m.ca.node == nil {
		return 0
	}
	var worst store.Revision
	for _, st := range m.ca.node.Status() {
		worst = max(worst, st.Sent-st.Acknowledged)
	}
	return float64(worst)
}

func (m *metrics) issued(kind, reason string, n int) {
	if reason == "" {
		reason = "issued"
	}
	m.svids.WithLabelValues(kind, reason).Add(float64(n))
}

// timed wraps a store with the latency histogram.
func (m *metrics) timed(s store.Store) store.Store { return &timedStore{s, m.commits} }

type timedStore struct {
	store.Store
	h *prometheus.HistogramVec
}

func (t *timedStore) Commit(ctx context.Context, checks []store.Check, writes []store.Write) (store.Revision, error) {
	start := time.Now()
	defer func() { t.h.WithLabelValues("commit").Observe(time.Since(start).Seconds()) }()
	return t.Store.Commit(ctx, checks, writes)
}

func (t *timedStore) Get(ctx context.Context, key string) (store.Item, error) {
	start := time.Now()
	defer func() { t.h.WithLabelValues("get").Observe(time.Since(start).Seconds()) }()
	return t.Store.Get(ctx, key)
}

// handler serves /metrics, /live and /ready.
func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "live") })
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := m.ca.Health(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
		for _, warning := range m.ca.rotator.Warnings() { // it works; an operator has to see to it that it goes on
			fmt.Fprintln(w, "warning: "+warning)
		}
		if err := m.ca.storeProblem(); err != nil {
			fmt.Fprintln(w, "warning: store:", err)
		}
		for _, p := range m.ca.upstream.problems() {
			fmt.Fprintln(w, "warning:", p)
		}
		for _, p := range m.ca.clusterProblems() {
			fmt.Fprintln(w, "warning:", p)
		}
	})
	return mux
}
