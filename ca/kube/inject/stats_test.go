package inject

import (
	"bytes"
	"testing"
)

// TestStats: what was injected and what was refused counts, and nothing else does.
func TestStats(t *testing.T) {
	w := start(t)
	eventually(t, "caBundle", func() bool { return len(w.caBundle()) > 0 })
	good := review(t, "shop", podWith(map[string]string{annotationInbound: "8443=8080"}))
	ask := func(body []byte, want string) {
		t.Helper()
		var answer []byte
		eventually(t, "answer", func() bool {
			var err error
			_, answer, err = w.post(w.caBundle(), body, "application/json")
			return err == nil
		})
		if !bytes.Contains(answer, []byte(want)) {
			t.Errorf("the answer is %s, want %q", answer, want)
		}
	}
	ask(good, `"patchType":"JSONPatch"`)
	ask(good, `"patchType":"JSONPatch"`)
	ask(review(t, "shop", podWith(map[string]string{annotationInbound: "nonsense"})), `"allowed":false`)
	ask(review(t, "kube-system", podWith(map[string]string{annotationInbound: "8443=8080"})), `"allowed":true`)
	ask([]byte("}{"), "not an AdmissionReview")
	if got := w.server.Stats(); got != (Stats{Injected: 2, Refused: 1}) {
		t.Errorf("counted %+v, want 2 injected and 1 refused", got)
	}
}
