package inject

import (
	"bytes"
	"context"
	"crypto/x509"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	admissionregistrationclient "k8s.io/client-go/kubernetes/typed/admissionregistration/v1"

	"github.com/signet-id/signet/ca/kube/follow/followtest"
)

// configurations are those of a fake clientset, which can be followed.
type configurations struct {
	admissionregistrationclient.MutatingWebhookConfigurationInterface
	place *followtest.Place
}

func (c configurations) List(ctx context.Context, o metav1.ListOptions) (*admissionregistrationv1.MutatingWebhookConfigurationList, error) {
	return followtest.List(ctx, c.place, c.MutatingWebhookConfigurationInterface, o)
}

func (c configurations) Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	return followtest.Watch(ctx, c.place, c.MutatingWebhookConfigurationInterface, o)
}

// TestCABundleIsKept: what an upgrade of the chart takes away is back at once.
func TestCABundleIsKept(t *testing.T) {
	w := start(t)
	eventually(t, "caBundle", func() bool { return len(w.caBundle()) > 0 })
	want := w.caBundle()
	configs := w.client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	m, err := configs.Get(t.Context(), "signet-inject", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m.Webhooks[0].ClientConfig.CABundle = nil
	if _, err := configs.Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "caBundle again", func() bool { return bytes.Equal(w.caBundle(), want) })
}

// TestCABundleIsNotFoughtFor: somebody who takes it away each time does not have the CA write all the time, which has other
// things to ask of that API server; when they stop it is put right.
func TestCABundleIsNotFoughtFor(t *testing.T) {
	w := start(t)
	configs := w.client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	taken, round := 0, time.NewTicker(2*time.Millisecond)
	defer round.Stop()
	for end := time.After(4 * time.Second); ; {
		select {
		case <-round.C:
			if len(w.caBundle()) == 0 {
				continue
			}
			if _, err := configs.Patch(t.Context(), "signet-inject", types.JSONPatchType, []byte(`[{"op":"remove","path":"/webhooks/0/clientConfig/caBundle"}]`), metav1.PatchOptions{}); err != nil {
				t.Fatal(err)
			}
			taken++
			continue
		case <-end:
		}
		break
	}
	if taken == 0 || taken > fightBurst+2 {
		t.Errorf("the caBundle was written %d times in four seconds", taken)
	}
	eventually(t, "caBundle", func() bool { return len(w.caBundle()) > 0 })
}

// TestClockGoesBack: a certificate that is not valid yet is no certificate to an API server.
func TestClockGoesBack(t *testing.T) {
	w := start(t)
	shown := func() *x509.Certificate {
		c, err := w.server.held.get()
		if err != nil {
			return &x509.Certificate{}
		}
		return c.Leaf
	}
	w.ahead.Store(int64(5 * time.Hour))
	eventually(t, "certificate of the later time", func() bool { return shown().NotBefore.After(time.Now()) })
	w.ahead.Store(0)
	eventually(t, "certificate that is valid now", func() bool { return shown().NotBefore.Before(time.Now()) && shown().NotAfter.After(time.Now()) })
}
