package proxy

import "testing"

// connections is how many connections of the first listener have had an outcome.
func (r *running) connections(t testing.TB, outcome string) float64 {
	t.Helper()
	return r.metric(t, "signet_proxy_connections_total", "outcome", outcome)
}

// metric sums up the counters and gauges of a name that have a label.
func (r *running) metric(t testing.TB, name, label, value string) float64 {
	t.Helper()
	families, err := r.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == label && l.GetValue() == value {
					sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
				}
			}
		}
	}
	return sum
}
