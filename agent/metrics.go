package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/signet-id/signet/agent/caclient"
	"github.com/signet-id/signet/agent/workloadattest"
	"github.com/signet-id/signet/policy/extauthz"
	"github.com/signet-id/signet/workloadapi"
)

// metrics are for alerts. No SPIFFE ID is ever a label. [DESIGN §10]
type metrics struct {
	agent    *Agent
	registry *prometheus.Registry
	calls    *prometheus.CounterVec
	pushes   *prometheus.CounterVec
	latency  *prometheus.HistogramVec
	failures *prometheus.CounterVec
	rejected prometheus.Counter

	decisions *prometheus.CounterVec
}

func newMetrics(a *Agent) *metrics {
	m := &metrics{
		agent:    a,
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_agent_calls_total",
			Help: "Ended calls on the agent's socket, by method and gRPC code."}, []string{"method", "code"}),
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_agent_pushes_total",
			Help: "Messages sent on streams of the agent's socket, by method."}, []string{"method"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "signet_agent_call_seconds",
			Help: "Duration of unary calls on the agent's socket.", Buckets: prometheus.ExponentialBuckets(0.0005, 4, 8)}, []string{"method"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_agent_attestation_failures_total",
			Help: "Attestations of processes in which a method could not find out everything, by method."}, []string{"method"}),
		rejected: prometheus.NewCounter(prometheus.CounterOpts{Name: "signet_agent_sds_rejected_total",
			Help: "Responses of SDS that an Envoy has refused; the log says why."}),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_agent_ext_authz_decisions_total",
			Help: "Calls that Envoys asked about, by answer and reason."}, []string{"answer", "reason"}),
	}
	m.registry.MustRegister(m.calls, m.rejected, m.decisions, m.pushes, m.latency, m.failures, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), &cacheCollector{agent: a})
	return m
}

// unary are the methods whose duration says something.
var unary = map[string]bool{
	"/SpiffeWorkloadAPI/FetchJWTSVID":    true,
	"/SpiffeWorkloadAPI/ValidateJWTSVID": true,
	extauthz.CheckMethod:                 true,
}

func (m *metrics) call(c workloadapi.CallEnd) {
	m.calls.WithLabelValues(c.Method, c.Code.String()).Inc()
	if unary[c.Method] {
		m.latency.WithLabelValues(c.Method).Observe(c.Duration.Seconds())
	}
}

func (m *metrics) push(method string) { m.pushes.WithLabelValues(method).Inc() }

// attestsBy shows the methods that have not failed yet, too, so that the first failure is a rise.
func (m *metrics) attestsBy(methods []workloadattest.Method) {
	for _, method := range methods {
		m.failures.WithLabelValues(method.Name())
	}
}

func (m *metrics) attestationFailed(method string) { m.failures.WithLabelValues(method).Inc() }

// A cacheCollector reads the agent's numbers when they are asked for.
type cacheCollector struct{ agent *Agent }

var (
	descState = prometheus.NewDesc("signet_agent_state", "1 for the state that the agent is in, 0 for each other.", []string{"state"}, nil)
	descSVIDs = prometheus.NewDesc("signet_agent_x509_svids", "X509-SVIDs held, by time left.", []string{"left"}, nil)
	descGauge = map[string]*prometheus.Desc{
		"entries":    prometheus.NewDesc("signet_agent_entries", "Registration entries of this node.", nil, nil),
		"jwt":        prometheus.NewDesc("signet_agent_jwt_svids", "JWT-SVIDs held.", nil, nil),
		"streams":    prometheus.NewDesc("signet_agent_streams", "Open subscriptions of workloads.", nil, nil),
		"connected":  prometheus.NewDesc("signet_agent_connected", "1 if the CA is there and the agent holds its newest state.", nil, nil),
		"polls":      prometheus.NewDesc("signet_agent_polls", "1 if the CA is a SPIRE server, which is asked for changes.", nil, nil),
		"revision":   prometheus.NewDesc("signet_agent_revision", "The CA's revision that the agent holds.", nil, nil),
		"offline":    prometheus.NewDesc("signet_agent_offline_seconds", "How long there has been no contact to the CA, over restarts; 0 while there is.", nil, nil),
		"restored":   prometheus.NewDesc("signet_agent_restored", "1 while what is served comes from the sealed cache.", nil, nil),
		"cache_bad":  prometheus.NewDesc("signet_agent_sealed_cache_failing", "1 if what is new cannot be written to the sealed cache.", nil, nil),
		"unsaved":    prometheus.NewDesc("signet_agent_sealed_cache_unsaved_seconds", "How long something has been waiting to be written to the sealed cache.", nil, nil),
		"own_expiry": prometheus.NewDesc("signet_agent_svid_not_after_seconds", "End of the agent's own SVID, Unix time.", nil, nil),
	}
	descIssued    = prometheus.NewDesc("signet_agent_x509_issued_total", "X509-SVIDs asked of the CA, by outcome.", []string{"outcome"}, nil)
	descJWT       = prometheus.NewDesc("signet_agent_jwt_fetched_total", "JWT-SVIDs, by where they came from.", []string{"outcome"}, nil)
	descRefused   = prometheus.NewDesc("signet_agent_refused_total", "Callers that got nothing, by reason.", []string{"reason"}, nil)
	descFollow    = prometheus.NewDesc("signet_agent_follow_messages_total", "Messages of the CA that were applied.", nil, nil)
	descConnected = prometheus.NewDesc("signet_agent_connections_total", "Connections that reached the CA.", nil, nil)
)

// Describe is prometheus.Collector's.
func (c *cacheCollector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

// Collect is prometheus.Collector's.
func (c *cacheCollector) Collect(ch chan<- prometheus.Metric) {
	status, stats, client := c.agent.Status(), c.agent.cache.Stats(), c.agent.client.Stats()
	gauge := func(name string, v float64) {
		ch <- prometheus.MustNewConstMetric(descGauge[name], prometheus.GaugeValue, v)
	}
	for _, state := range states {
		in := 0.0
		if state == status.State {
			in = 1
		}
		ch <- prometheus.MustNewConstMetric(descState, prometheus.GaugeValue, in, string(state))
	}
	c.agent.collectObservations(ch)
	gauge("entries", float64(stats.Entries))
	gauge("jwt", float64(stats.JWTSVIDs))
	gauge("streams", float64(stats.Watchers))
	gauge("revision", float64(status.Revision))
	connected := 0.0
	if status.Connected {
		connected = 1
	}
	gauge("connected", connected)
	polls := 0.0
	if c.agent.client.Server() == caclient.SPIRE {
		polls = 1
	}
	gauge("polls", polls)
	offline, restored := 0.0, 0.0
	if !status.OfflineSince.IsZero() {
		offline = max(c.agent.config.Now().Sub(status.OfflineSince).Seconds(), 0)
	}
	if !status.RestoredAt.IsZero() {
		restored = 1
	}
	gauge("offline", offline)
	gauge("restored", restored)
	if c.agent.sealed != nil {
		st, failing := c.agent.sealed.Status(), 0.0
		if st.Err != nil {
			failing = 1
		}
		gauge("cache_bad", failing)
		gauge("unsaved", st.Unsaved.Seconds())
	}
	if !status.NotAfter.IsZero() {
		gauge("own_expiry", float64(status.NotAfter.Unix()))
	}
	left := map[string]int{"expired": 0, "under 1m": 0, "under 10m": 0, "under 1h": 0, "1h and more": 0}
	for _, d := range stats.TimeLeft {
		left[bucket(d)]++
	}
	for name, n := range left {
		ch <- prometheus.MustNewConstMetric(descSVIDs, prometheus.GaugeValue, float64(n), name)
	}
	counter := func(d *prometheus.Desc, v int64, label ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), label...)
	}
	counter(descIssued, stats.Issued, "issued")
	counter(descIssued, stats.IssueErrors, "failed")
	counter(descJWT, stats.JWTIssued, "issued")
	counter(descJWT, stats.JWTErrors, "failed")
	counter(descJWT, stats.JWTHits, "cached")
	counter(descRefused, stats.NoIdentity, "no_identity")
	counter(descRefused, stats.NotReady, "not_ready")
	counter(descRefused, stats.RateLimited, "rate_limited")
	counter(descFollow, client.Applied)
	counter(descConnected, client.Connections)
}

func bucket(left time.Duration) string {
	switch {
	case left <= 0:
		return "expired"
	case left < time.Minute:
		return "under 1m"
	case left < 10*time.Minute:
		return "under 10m"
	case left < time.Hour:
		return "under 1h"
	}
	return "1h and more"
}

// handler serves /metrics, /live and /ready.
func (m *metrics) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4,
		DisableCompression:  true, // it takes more memory than all else that an idle agent holds
	}))
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		status := m.agent.Status()
		if why := status.notReady(); why != "" {
			http.Error(w, why, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// serve answers on l until ctx ends.
func (m *metrics) serve(ctx context.Context, l net.Listener) error {
	const headerTimeout, stopTimeout = 10 * time.Second, time.Second
	server := &http.Server{Handler: m.handler(), ReadHeaderTimeout: headerTimeout, WriteTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	var err error
	select {
	case <-ctx.Done():
		stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if server.Shutdown(stopping) != nil {
			_ = server.Close() // what did not end by itself is cut off
		}
		err = <-served
	case err = <-served:
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serving metrics: %w", err)
}
