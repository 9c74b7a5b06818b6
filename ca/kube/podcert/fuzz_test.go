package podcert

import (
	"crypto/x509"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	"k8s.io/apimachinery/pkg/types"
)

func p2id(t testing.TB, path string) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.FromPath(td, path)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// FuzzReadKey: what is accepted is a key that encodes to the bytes that came, with a proof that holds for this pod's UID alone.
func FuzzReadKey(f *testing.F) {
	pkix, proof := prove(f, newKey(f), "uid")
	f.Add(pkix, proof, "uid")
	f.Add(pkix, proof, "other")
	f.Add([]byte{0x30, 0x59}, []byte{0x30}, "")
	f.Fuzz(func(t *testing.T, pkix, proof []byte, uid string) {
		spec := &certificatesv1beta1.PodCertificateRequestSpec{PKIXPublicKey: pkix, ProofOfPossession: proof, PodUID: types.UID(uid)}
		key, err := readKey(spec)
		if err != nil {
			return
		}
		if again, err := x509.MarshalPKIXPublicKey(key); err != nil || string(again) != string(pkix) {
			t.Errorf("accepted %x, which encodes as %x, %v", pkix, again, err)
		}
		spec.PodUID += "x"
		if _, err := readKey(spec); err == nil {
			t.Error("the proof holds for another pod")
		}
	})
}
