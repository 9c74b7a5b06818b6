package inject

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"sync"
	"time"
)

const (
	// lookEvery is how often the certificate is compared with the authorities, which costs nothing.
	lookEvery = time.Second
	// signTime bounds one signature.
	signTime = 10 * time.Second
	// settle is how long API servers may take to notice the caBundle that they are shown.
	settle = 3 * time.Second
)

// held is the webhook's own X509-SVID. A new one, by a new authority, is shown only once the API servers are known to trust that
// authority: so no admission fails while authorities rotate.
type held struct {
	c *Config
	// trusted tells since when API servers have been told to trust an authority.
	trusted func(root *x509.Certificate) (since time.Time, told bool)

	mu   sync.Mutex // guards what follows
	now  *certificate
	next *certificate // waits for trust
}

type certificate struct {
	tls       tls.Certificate
	root      *x509.Certificate
	active    string // authority
	half, end time.Time
}

// early says that the certificate is not valid yet: the clock went back since it was made.
func (c *certificate) early(now time.Time) bool { return now.Before(c.tls.Leaf.NotBefore) }

// fresh says that it need not be replaced.
func (c *certificate) fresh(now time.Time) bool { return !c.early(now) && now.Before(c.half) }

// get returns what handshakes show.
func (h *held) get() (*tls.Certificate, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now == nil || !h.c.Now().Before(h.now.end) {
		return nil, errors.New("the webhook has no X509-SVID yet")
	}
	return &h.now.tls, nil
}

// run renews until ctx ends.
func (h *held) run(ctx context.Context) {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	failing := false
	for {
		if err := h.renew(ctx); err != nil && ctx.Err() == nil && !failing {
			failing = true
			h.c.Log.Warn("the X509-SVID of the admission webhook cannot be renewed; the old one serves until its end", "cluster", h.c.Cluster, "err", err)
		} else if err == nil {
			failing = false
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// renew makes a new certificate if one is due, and shows it if it may be shown.
func (h *held) renew(ctx context.Context) error {
	now, active := h.c.Now(), h.c.Active()
	h.mu.Lock()
	shown, waiting := h.now, h.next
	h.mu.Unlock()
	if shown != nil && shown.active == active && shown.fresh(now) {
		return nil
	}
	if waiting == nil || waiting.active != active || !waiting.fresh(now) {
		var err error
		if waiting, err = h.sign(ctx, active); err != nil {
			return err
		}
	}
	since, told := h.trusted(waiting.root)
	ready := told && now.Sub(since) >= settle
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next = waiting
	// What nobody trusts any more, or is about to end, is no better than what nobody trusts yet.
	if ready || shown == nil || shown.root.Equal(waiting.root) || !h.published(shown.root) || shown.early(now) || shown.end.Sub(now) < shown.end.Sub(shown.half)/2 {
		h.now, h.next = waiting, nil
	}
	return nil
}

func (h *held) published(root *x509.Certificate) bool {
	for _, r := range h.c.Roots() {
		if r.Equal(root) {
			return true
		}
	}
	return false
}

func (h *held) sign(ctx context.Context, active string) (*certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, signTime)
	defer cancel()
	svid, err := h.c.Sign(ctx, key.Public())
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(svid.Chain[0])
	if err != nil {
		return nil, err
	}
	return &certificate{tls: tls.Certificate{Certificate: svid.Chain, PrivateKey: key, Leaf: leaf}, root: svid.Root, active: active,
		half: svid.NotBefore.Add(svid.NotAfter.Sub(svid.NotBefore) / 2), end: svid.NotAfter}, nil
}
