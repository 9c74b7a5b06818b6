//go:build !cgo

package keys

import (
	"strings"
	"testing"
)

// The static program says what to do instead of failing in the driver. make test runs this with CGO_ENABLED=0.
func TestStaticProgramRefusesPKCS11(t *testing.T) {
	for _, uri := range []string{"pkcs11:module-path=/usr/lib/m.so;token=a", "pkcs11:token=a?pin-source=/etc/pin"} {
		err := mustParse(t, uri).Linked()
		if err == nil || !strings.Contains(err.Error(), "signet-hsm") {
			t.Errorf("Linked of %s = %v, want that it names signet-hsm", uri, err)
		}
	}
}
