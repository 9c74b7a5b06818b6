package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/signet-id/signet/policy"
)

// metrics are for alerts. No SPIFFE ID is ever a label. [DESIGN §10]
type metrics struct {
	registry    *prometheus.Registry
	open        *prometheus.GaugeVec
	connections *prometheus.CounterVec
	ended       *prometheus.CounterVec
	bytes       *prometheus.CounterVec
	decisions   *prometheus.CounterVec
	requests    *prometheus.CounterVec
	accept      *prometheus.CounterVec
}

func newMetrics(p *Proxy) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "signet_proxy_connections",
			Help: "Open connections that were accepted, by listener."}, []string{"listener"}),
		connections: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_proxy_connections_total",
			Help: "Connections, by listener and what became of them: passed on, denied, handshake (failed), no_identity (of the proxy), limit (too many), backend (not reached); withdrawn are those of the passed ones whose peer would not be let in any more."},
			[]string{"listener", "outcome"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_proxy_connections_ended_total",
			Help: "Relayed connections that have ended, by listener and how: closed (in order), idle, drained, withdrawn (by revocation, policy or expiry), truncated, error."}, []string{"listener", "how"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_proxy_bytes_total",
			Help: "Bytes of relayed connections that have ended, by listener and direction."}, []string{"listener", "direction"}),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_proxy_decisions_total",
			Help: "Decisions, by listener and reason; shadow is what would be decided if everything that only reports were enforced."}, []string{"listener", "allowed", "reason", "shadow"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_proxy_requests_total",
			Help: "HTTP requests, by listener and class of status code."}, []string{"listener", "code"}),
		accept: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "signet_proxy_accept_errors_total",
			Help: "Times that the system gave a listener no connection, for want of descriptors or memory."}, []string{"listener"}),
	}
	m.registry.MustRegister(m.open, m.connections, m.ended, m.bytes, m.decisions, m.requests, m.accept, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "signet_proxy_ready", Help: "1 if every listener has an X509-SVID and policies to decide by."}, func() float64 {
			if p.notReady() != "" {
				return 0
			}
			return 1
		}))
	return m
}

// counts are the metrics of one listener.
type counts struct {
	m                                                                *metrics
	name                                                             string
	open                                                             prometheus.Gauge
	passed, denied, handshake, noIdentity, limit, backend, withdrawn prometheus.Counter
	accept                                                           prometheus.Counter
}

func (m *metrics) of(name string) *counts {
	outcome := func(what string) prometheus.Counter { return m.connections.WithLabelValues(name, what) }
	return &counts{m: m, name: name, open: m.open.WithLabelValues(name), passed: outcome("passed"), denied: outcome("denied"), handshake: outcome("handshake"),
		noIdentity: outcome("no_identity"), limit: outcome("limit"), backend: outcome("backend"), withdrawn: outcome("withdrawn"), accept: m.accept.WithLabelValues(name)}
}

// decided counts a decision.
func (c *counts) decided(j policy.Judgement) {
	shadow := "same"
	if j.Decision.ShadowDiffers() {
		shadow = strconv.FormatBool(j.Decision.Shadow.Allowed)
	}
	c.m.decisions.WithLabelValues(c.name, strconv.FormatBool(j.Decision.Allowed), j.Decision.Reason.String(), shadow).Inc()
}

func (c *counts) request(status int) {
	c.m.requests.WithLabelValues(c.name, strconv.Itoa(status/100)+"xx").Inc()
}

// ended counts a relayed connection that has ended.
func (c *counts) ended(r *relay, err error) {
	how := "error"
	switch {
	case err == nil:
		how = "closed"
	case errors.Is(err, errIdle):
		how = "idle"
	case errors.Is(err, errDrained):
		how = "drained"
	case errors.Is(err, errWithdrawn):
		how = "withdrawn"
	case errors.Is(err, errTruncated):
		how = "truncated"
	}
	c.m.ended.WithLabelValues(c.name, how).Inc()
	c.m.bytes.WithLabelValues(c.name, "received").Add(float64(r.aToB.Load()))
	c.m.bytes.WithLabelValues(c.name, "sent").Add(float64(r.bToA.Load()))
}

// handler serves /metrics, /live and /ready.
func (m *metrics) handler(notReady func() string) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, DisableCompression: true}))
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if why := notReady(); why != "" {
			http.Error(w, why, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// serve answers on l until ctx ends.
func (m *metrics) serve(ctx context.Context, l net.Listener, notReady func() string) error {
	const headerTimeout, stopTimeout = 10 * time.Second, time.Second
	server := &http.Server{Handler: m.handler(notReady), ReadHeaderTimeout: headerTimeout, WriteTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
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
