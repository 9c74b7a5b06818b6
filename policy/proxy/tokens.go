package proxy

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/signet-id/signet/jwtauth"
)

// FetchJWTSVID is jwtauth.Fetcher's.
func (i *identity) FetchJWTSVID(ctx context.Context, p jwtsvid.Params) (*jwtsvid.SVID, error) {
	client := i.client.Load()
	if client == nil {
		return nil, errNoAgent
	}
	return client.FetchJWTSVID(ctx, p)
}

// tokens returns the cache of the JWT-SVIDs of one SPIFFE ID; of the default one if the ID is zero. There is one for each ID
// that outbound listeners have named since the start.
func (i *identity) tokens(id spiffeid.ID) (*jwtauth.Cache, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if c := i.caches[id]; c != nil {
		return c, nil
	}
	c, err := jwtauth.New(jwtauth.Config{Fetcher: i, Subject: id, Log: i.log, Now: i.now})
	if err != nil {
		return nil, err
	}
	if i.caches == nil {
		i.caches = make(map[spiffeid.ID]*jwtauth.Cache)
	}
	i.caches[id] = c
	return c, nil
}

// closeTokens ends the renewal of tokens. No request is under way any more.
func (i *identity) closeTokens() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, c := range i.caches {
		_ = c.Close() // it never fails
	}
	i.caches = nil
}
