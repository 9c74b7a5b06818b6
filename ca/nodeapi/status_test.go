package nodeapi

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-id/signet/ca/authority"
)

// TestNoKeyStoreIsUnavailable: an agent asks again, and is told nothing of the key store.
func TestNoKeyStoreIsUnavailable(t *testing.T) {
	a := New(Config{Log: slog.New(slog.DiscardHandler)})
	for _, err := range []error{
		fmt.Errorf("key pkcs11:object=secret: signing: %w", authority.ErrUnavailable),
		&authority.UpstreamError{Upstream: "disk secret", Err: errors.New("gone")},
	} {
		if st := status.Convert(a.toStatus(err)); st.Code() != codes.Unavailable || strings.Contains(st.Message(), "secret") {
			t.Errorf("%v becomes %v", err, st)
		}
	}
}
