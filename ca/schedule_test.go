package ca

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/signet-id/signet/ca/authority"
)

// page fetches a page of the metrics port.
func (h *harness) page(path string) (int, string) {
	h.t.Helper()
	r, err := http.Get("http://" + h.ca.MetricsAddr().String() + path)
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// TestScheduleAcrossClockJumps: the clock jumps ten months on, and one rotation follows, not two; it jumps back, and what
// was made in the future signs nothing: another authority is made that can.
func TestScheduleAcrossClockJumps(t *testing.T) {
	var clock movedClock
	c := config(t.TempDir())
	c.Now, c.settle = clock.now, 100*time.Millisecond
	h := start(t, c)
	generations := func() uint64 {
		all := h.ca.set.Authorities(authority.KindX509)
		return all[len(all)-1].Generation
	}
	active := func() string {
		for _, a := range h.ca.set.Authorities(authority.KindX509) {
			if a.State == authority.StateActive {
				return a.ID
			}
		}
		return ""
	}
	first := active()
	clock.move(300 * 24 * time.Hour)
	h.ca.rotator.BundleChanged() // look now, not in ten seconds
	until(t, "a rotation after the jump", func() bool { h.ca.rotator.BundleChanged(); return active() != first })
	if n := generations(); n != 2 {
		t.Errorf("%d authorities were made, want 2", n)
	}
	second := active()
	if got := h.ca.set.Authorities(authority.KindX509)[0].State; got != authority.StateOld {
		t.Errorf("the first one is %s: it left while SVIDs of it are valid", got)
	}
	clock.move(0)
	if err := h.ca.set.Health(); err == nil {
		t.Error("it signs with an authority of the future")
	}
	until(t, "an authority that can sign now", func() bool { h.ca.rotator.BundleChanged(); return h.ca.set.Health() == nil })
	if active() == second || active() == "" {
		t.Errorf("the active one is %q", active())
	}
	until(t, "the reason in the audit log", func() bool { // which follows the step itself
		records := h.audit("authority.activate")
		if len(records) < 2 {
			return false
		}
		why, _ := records[len(records)-1]["details"].(map[string]any)["why"].(string)
		return strings.Contains(why, "cannot sign")
	})
}

// TestWarningsAndMetricsOfAuthorities: an authority that nears its end without a successor is warned of while the CA is
// ready, and one that has ended is not ready.
func TestWarningsAndMetricsOfAuthorities(t *testing.T) {
	var clock movedClock
	c := quiet(t.TempDir())
	c.Now, c.Metrics.Listen = clock.now, "127.0.0.1:0"
	h := start(t, c)
	if code, body := h.page("/ready"); code != 200 || strings.Contains(body, "warning") {
		t.Errorf("at first: %d %s", code, body)
	}
	h.agent() // acknowledges nothing
	id := h.prepare(typeJWT)
	if _, body := h.page("/metrics"); !strings.Contains(body, `signet_ca_authority_laggards{kind="jwt"} 1`) || !strings.Contains(body, `signet_ca_authority_laggards{kind="x509"} 0`) ||
		!strings.Contains(body, `signet_ca_authority_seconds_left{kind="x509"} 3.15`) {
		t.Errorf("metrics: %s", body)
	}
	clock.move(10 * time.Minute)
	if code, body := h.page("/ready"); code != 200 || !strings.Contains(body, "have not handed on the prepared jwt authority "+id) {
		t.Errorf("with a laggard: %d %s", code, body)
	}
	clock.move(80 * 24 * time.Hour)
	if code, body := h.page("/ready"); code != 200 {
		t.Errorf("after 80 days: %d %s", code, body)
	}
	clock.move(91 * 24 * time.Hour)
	if code, _ := h.page("/ready"); code != 503 {
		t.Errorf("with a JWT authority that has ended: %d", code)
	}
}

// TestTTLsThatRotationCannotHonour are refused when they are configured: FED-04.
func TestTTLsThatRotationCannotHonour(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Config)
		want   string // in the error; empty: none
	}{
		{"defaults", func(*Config) {}, ""},
		{"a life that leaves none beside the longest TTL", func(c *Config) { c.Authorities.X509Lifetime = 30 * time.Hour }, "authorities.x509_lifetime: 30h0m0s is too short for rotation"},
		{"the same by hand", func(c *Config) { c.Authorities.X509Lifetime, c.Authorities.Rotate = 30*time.Hour, "manual" }, ""},
		{"a shorter TTL with it", func(c *Config) { c.Authorities.X509Lifetime, c.TTL.MaxX509 = 30*time.Hour, 2*time.Hour }, ""},
		{"a refresh hint that takes too long", func(c *Config) { c.Authorities.JWTLifetime, c.Authorities.RefreshHint = 24*time.Hour, 4*time.Hour }, "authorities.jwt_lifetime: 24h0m0s is too short for rotation"},
		{"an unknown way to rotate", func(c *Config) { c.Authorities.Rotate = "often" }, `authorities.rotate: "often" is not auto or manual`},
		{"a negative deadline", func(c *Config) { c.Authorities.ActivationDeadline = -time.Second }, "authorities.activation_deadline"},
		{"a negative rate", func(c *Config) { c.Authorities.ReissueRate = -1 }, "authorities.reissue_rate"},
	} {
		c := config("/nowhere")
		tt.change(&c)
		err := c.Check()
		if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}
