package k8spsat

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/signet-id/signet/ca/nodeattest"
	"github.com/signet-id/signet/test/cloudtest"
)

const (
	ownToken  = cloudtest.OwnToken
	nodeToken = cloudtest.NodeToken
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// newAttestor returns one for the cluster prod, which is the stand-in.
func newAttestor(t *testing.T, s *cloudtest.Kubernetes, change ...func(*Cluster)) *Attestor {
	t.Helper()
	k := Cluster{ServiceAccounts: []string{"signet:agent"}, Kubeconfig: s.Kubeconfig(t), NodeLabels: []string{"zone"}, PodLabels: []string{"app", "absent"}}
	for _, c := range change {
		c(&k)
	}
	a, err := New(Config{Clusters: map[string]Cluster{"prod": k}})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func attest(a *Attestor, payload string) (*nodeattest.Evidence, error) {
	return a.Attest(context.Background(), nodeattest.Attempt{Payload: []byte(payload)})
}

const goodPayload = `{"cluster":"prod","token":"` + nodeToken + `"}`

// refusal returns the refusal that err must be, and sees to it that no secret is in it.
func refusal(t *testing.T, err error) *nodeattest.Refusal {
	t.Helper()
	r, ok := errors.AsType[*nodeattest.Refusal](err)
	if !ok {
		t.Fatalf("error %v is no refusal", err)
	}
	for _, secret := range []string{ownToken, nodeToken} {
		if strings.Contains(r.Error(), secret) {
			t.Fatalf("the error %q repeats a secret", r.Error())
		}
	}
	return r
}
