package proxy

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

// token returns a JWT-SVID for an audience. The agent keeps them and renews them ahead, so that it is asked each time.
func (i *identity) token(ctx context.Context, id spiffeid.ID, audience string) (string, error) {
	client := i.client.Load()
	if client == nil {
		return "", errNoAgent
	}
	svid, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Subject: id, Audience: audience})
	if err != nil {
		return "", err
	}
	return svid.Marshal(), nil
}
