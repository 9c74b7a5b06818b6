package observe

import (
	"net/http"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-id/signet/test/signettest"
)

// TestWhyDeniedRevoked: whoever asks why a revoked caller was refused learns who revoked it, why and until when, and is
// not sent to change a policy.
func TestWhyDeniedRevoked(t *testing.T) {
	t.Parallel()
	w := newWorld(t, signettest.Config{})
	addr := strings.TrimPrefix(w.serve(), "https://")
	svid, err := w.svids[reader].GetX509SVID() // the agent takes it back
	if err != nil {
		t.Fatal(err)
	}
	get := func() error {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: tlsconfig.MTLSClientConfig(svid, w.svids[service], tlsconfig.AuthorizeAny())}}
		request, err := http.NewRequestWithContext(w.ctx, http.MethodGet, "https://"+addr+"/v1/a", nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errorText(response.Status)
		}
		return nil
	}
	if err := get(); err != nil {
		t.Fatalf("before the revocation: %v", err)
	}
	socket := "--socket=" + w.CASocket()
	if code, _, errs := run(w.ctx, "revoke", socket, "--id=/reader", "--name=leak", "--reason=key on a public host", "--expires=2h"); code != 0 {
		t.Fatalf("revoke: %s", errs)
	}
	w.until("the service refuses", func() error {
		if get() == nil {
			return errorText("it still answers")
		}
		return nil
	})
	var out string
	w.until("the CA knows", func() error {
		var code int
		var errs string
		if code, out, errs = run(w.ctx, "why-denied", socket, "--peer=/reader", "--service=/documents", "--last"); code != 0 {
			return errorText(errs)
		}
		return nil
	})
	contains(t, out, "denied", "revocation:", "leak", "key on a public host", "by:", "until:", reader, "as long as the revocation \"leak\" is in force, no policy lets the caller in")
	if strings.Contains(out, "smallest change") {
		t.Errorf("a change of policies is proposed:\n%s", out)
	}
	if code, _, errs := run(w.ctx, "unrevoke", socket, "leak"); code != 0 {
		t.Fatalf("unrevoke: %s", errs)
	}
	_, out, _ = run(w.ctx, "why-denied", socket, "--peer=/reader", "--service=/documents", "--last")
	contains(t, out, "leak (no longer in force)")
	w.until("the service answers", get)
}
