package workloadapi_test

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"

	"github.com/signet-id/signet/workloadapi"
)

// TestReasons calls over the real socket and looks at what a client gets: the code that CONFORMANCE demands, and with it
// the stable reason.
func TestReasons(t *testing.T) {
	a := newAuthority(t, "example.org", "k1")
	nobody := newMemory(a)
	for _, tt := range []struct {
		name   string
		call   func(t *testing.T) error
		code   codes.Code
		reason workloadapi.Reason
	}{
		{"no entry", func(t *testing.T) error {
			e := serve(t, nobody)
			return last(e.client(t).FetchX509SVID(contextWithin(t, 10*time.Second), &workload.X509SVIDRequest{}))
		}, codes.PermissionDenied, workloadapi.ReasonNoIdentity},
		{"no header", func(t *testing.T) error {
			e := serve(t, nobody)
			return last(e.client(t).FetchX509SVID(t.Context(), &workload.X509SVIDRequest{}))
		}, codes.InvalidArgument, workloadapi.ReasonHeaderMissing},
		{"no audience", func(t *testing.T) error {
			e := serve(t, nobody)
			_, err := e.client(t).FetchJWTSVID(contextWithin(t, 10*time.Second), &workload.JWTSVIDRequest{})
			return err
		}, codes.InvalidArgument, workloadapi.ReasonInvalidArgument},
		{"a token that is none", func(t *testing.T) error {
			e := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}))
			_, err := e.client(t).ValidateJWTSVID(contextWithin(t, 10*time.Second), &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: "y"})
			return err
		}, codes.InvalidArgument, workloadapi.ReasonTokenInvalid},
		{"switched off", func(t *testing.T) error {
			e := serve(t, nobody, func(c *workloadapi.Config) { c.DisableX509 = true })
			return last(e.client(t).FetchX509SVID(contextWithin(t, 10*time.Second), &workload.X509SVIDRequest{}))
		}, codes.Unimplemented, workloadapi.ReasonDisabled},
		{"too many calls", func(t *testing.T) error {
			e := serve(t, newMemory(a, entry{match: everyone, identity: a.identity(t, "/web")}), func(c *workloadapi.Config) { c.MaxStreams, c.MaxStreamsPerUID = 8, 1 })
			ctx, cancel := context.WithCancel(contextWithin(t, 10*time.Second))
			defer cancel()
			c := e.client(t)
			first, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err == nil {
				_, err = first.Recv()
			}
			if err != nil {
				t.Fatal(err)
			}
			return last(c.FetchX509SVID(contextWithin(t, 10*time.Second), &workload.X509SVIDRequest{}))
		}, codes.Unavailable, workloadapi.ReasonTooManyCalls},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.call(t)
			if codeOf(err) != tt.code || workloadapi.ReasonOf(err) != tt.reason {
				t.Errorf("%v: code %v and reason %q, want %v and %q", err, codeOf(err), workloadapi.ReasonOf(err), tt.code, tt.reason)
			}
		})
	}
}

// TestReasonsAreDocumented: each reason is a row of the document with its code, and no row is of a reason that is not there.
func TestReasonsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/reference/reasons.md")
	if err != nil {
		t.Fatal(err)
	}
	table, _, _ := strings.Cut(string(text), "\n## ")
	for _, r := range workloadapi.Reasons {
		if strings.Count(table, "| `"+string(r)+"` | ") != 1 {
			t.Errorf("docs/reference/reasons.md has not one row for %s", r)
		}
	}
	if rows := strings.Count(table, "\n| `"); rows != len(workloadapi.Reasons) {
		t.Errorf("docs/reference/reasons.md has %d rows, and there are %d reasons", rows, len(workloadapi.Reasons))
	}
}
