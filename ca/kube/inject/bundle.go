package inject

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/signet-id/signet/ca/kube/follow"
)

const (
	// linger is how long an authority that left the bundle stays in the caBundle, so that every replica has shown a certificate
	// of another one by then.
	linger = 10 * time.Second
	// patchTime bounds a request, and firstPatch and maxPatch the waits between tries.
	patchTime  = 10 * time.Second
	firstPatch = 500 * time.Millisecond
	maxPatch   = 30 * time.Second
	// fightBurst is how often the caBundle is put right at once, and fightEvery how often in the long run: somebody else may take it
	// away each time, as quickly as the API server takes it.
	fightBurst = 10
	fightEvery = 10 * time.Second
)

var errFight = errors.New("somebody changes it each time that it was put right; it is put right six times a minute at most: find out who (kubectl get --show-managed-fields), and have them leave it")

// A bundleKeeper follows the webhook's configuration at the API server, and, where it leads, keeps its caBundle.
type bundleKeeper struct {
	c       *Config
	changed chan struct{} // one slot: look again
	pace    *rate.Limiter // of patches

	mu    sync.Mutex // guards what follows
	shown *admissionregistrationv1.MutatingWebhookConfiguration
	since map[[sha256.Size]byte]time.Time // authorities in every caBundle, and when they were first seen there
	left  map[[sha256.Size]byte]leaving
}

type leaving struct {
	cert *x509.Certificate
	at   time.Time // zero: it has not left the bundle
}

func newBundleKeeper(c *Config) *bundleKeeper {
	return &bundleKeeper{c: c, changed: make(chan struct{}, 1), pace: rate.NewLimiter(rate.Every(fightEvery), fightBurst), since: map[[sha256.Size]byte]time.Time{}, left: map[[sha256.Size]byte]leaving{}}
}

// trusts tells since when the API server's configuration has had an authority.
func (b *bundleKeeper) trusts(root *x509.Certificate) (time.Time, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	at, ok := b.since[sha256.Sum256(root.Raw)]
	return at, ok
}

// watch follows the configuration until ctx ends.
func (b *bundleKeeper) watch(ctx context.Context) {
	ours := fields.OneTermEqualSelector("metadata.name", b.c.Webhook).String()
	follow.New(follow.Config{Name: "MutatingWebhookConfiguration " + b.c.Webhook, Store: &configStore{b: b}, Log: b.c.Log.With("cluster", b.c.Cluster),
		List: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = ours
			return b.c.Configurations.List(ctx, o)
		},
		Watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = ours
			return b.c.Configurations.Watch(ctx, o)
		},
	}).Run(ctx)
}

// A configStore hands the configuration on.
type configStore struct {
	b     *bundleKeeper
	there bool // in the list that is under way
}

// Begin implements follow.Store.
func (s *configStore) Begin() { s.there = false }

// Put implements follow.Store.
func (s *configStore) Put(o metav1.Object) {
	if m, ok := o.(*admissionregistrationv1.MutatingWebhookConfiguration); ok && m.Name == s.b.c.Webhook {
		s.there = true
		s.b.saw(m)
	}
}

// End implements follow.Store.
func (s *configStore) End() {
	if !s.there {
		s.b.saw(nil)
	}
}

// Delete implements follow.Store.
func (s *configStore) Delete(o metav1.Object) {
	if o.GetName() == s.b.c.Webhook {
		s.b.saw(nil)
	}
}

// saw notes the configuration as it is now; nil: there is none.
func (b *bundleKeeper) saw(m *admissionregistrationv1.MutatingWebhookConfiguration) {
	b.mu.Lock()
	b.shown = m
	was := b.since
	b.since = map[[sha256.Size]byte]time.Time{}
	if m != nil && len(m.Webhooks) > 0 {
		count := map[[sha256.Size]byte]int{}
		for _, w := range m.Webhooks {
			for _, c := range parse(w.ClientConfig.CABundle) {
				count[sha256.Sum256(c.Raw)]++
			}
		}
		for sum, n := range count {
			if n < len(m.Webhooks) {
				continue
			}
			if at, ok := was[sum]; ok {
				b.since[sum] = at
			} else {
				b.since[sum] = b.c.Now()
			}
		}
	}
	b.mu.Unlock()
	select {
	case b.changed <- struct{}{}:
	default:
	}
}

// lead keeps the caBundle until ctx ends.
func (b *bundleKeeper) lead(ctx context.Context) error {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	wait, said := time.Duration(0), false
	var next time.Time
	for {
		if !time.Now().Before(next) {
			err := b.keep(ctx)
			switch {
			case err == nil:
				wait, said = 0, false
			case ctx.Err() == nil:
				// A conflict is that somebody changed it, such as this CA a moment ago: what is there now comes by the watch.
				if !said && !apierrors.IsConflict(err) {
					b.c.Log.Warn("the caBundle of the admission webhook cannot be kept; trying again", "cluster", b.c.Cluster, "webhook", b.c.Webhook, "err", err)
					said = true
				}
				wait = min(max(2*wait, firstPatch), maxPatch)
				next = time.Now().Add(wait/2 + rand.N(wait/2+1))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-b.changed:
		case <-t.C:
		}
	}
}

// keep writes the caBundle if it is not what it should be.
func (b *bundleKeeper) keep(ctx context.Context) error {
	want := encode(b.wanted())
	b.mu.Lock()
	shown := b.shown
	b.mu.Unlock()
	if shown == nil {
		return nil // the chart has not made it yet; it comes by the watch
	}
	// The version that was seen: of another one the API server says that this is a conflict.
	ops := []operation{{"add", "/metadata/resourceVersion", shown.ResourceVersion}}
	for i, w := range shown.Webhooks {
		if !bytes.Equal(w.ClientConfig.CABundle, want) {
			ops = append(ops, operation{"add", fmt.Sprintf("/webhooks/%d/clientConfig/caBundle", i), want})
		}
	}
	if len(ops) == 1 {
		return nil
	}
	patch, err := json.Marshal(ops)
	if err != nil {
		return err
	}
	if !b.pace.Allow() {
		return errFight
	}
	ctx, cancel := context.WithTimeout(ctx, patchTime)
	defer cancel()
	_, err = b.c.Configurations.Patch(ctx, b.c.Webhook, types.JSONPatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// wanted are the authorities of the bundle, and those that left it a moment ago.
func (b *bundleKeeper) wanted() []*x509.Certificate {
	now, roots := b.c.Now(), b.c.Roots()
	b.mu.Lock()
	defer b.mu.Unlock()
	in := map[[sha256.Size]byte]bool{}
	out := append([]*x509.Certificate(nil), roots...)
	for _, r := range roots {
		sum := sha256.Sum256(r.Raw)
		in[sum] = true
		b.left[sum] = leaving{cert: r}
	}
	for sum, l := range b.left {
		switch {
		case in[sum]:
		case l.at.IsZero():
			b.left[sum] = leaving{l.cert, now}
			out = append(out, l.cert)
		case now.Sub(l.at).Abs() < linger:
			out = append(out, l.cert)
		default:
			delete(b.left, sum)
		}
	}
	slices.SortFunc(out, func(a, b *x509.Certificate) int { return bytes.Compare(a.Raw, b.Raw) }) // the same set is the same bytes
	return out
}

func encode(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		// Writing into memory does not fail.
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return b.Bytes()
}

func parse(text []byte) []*x509.Certificate {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return out
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			out = append(out, c)
		}
	}
}
