// Package lookup finds keys in cloud key stores by the names under which they were made, where their drivers cannot. The
// program imports it beside those drivers; it registers itself with package keys, and does nothing else by itself.
package lookup

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/signet-id/signet/ca/keys"
)

// maxPages bounds how far a listing of a whole account is followed: 100 or more entries a page.
const maxPages = 500

func init() {
	keys.RegisterLookup("awskms", keys.Lookup{Find: findAWS})
	keys.RegisterLookup("azurekms", keys.Lookup{Absent: absentAzure})
}

// absentAzure tells the answer that there is no such key from every other.
func absentAzure(err error) bool {
	var answer *azcore.ResponseError
	return errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound
}

// findAWS looks for a key that the driver made: AWS chooses key ids itself, and the driver calls the key by an alias that
// begins with the name, which it makes after the key. So a key whose alias was not made in time is looked for by its
// description, which takes one request for each key of the account and is done after a crash only.
func findAWS(ctx context.Context, attribute func(string) string, name string) (string, error) {
	client, err := awsClient(ctx, attribute)
	if err != nil {
		return "", err
	}
	aliases := kms.NewListAliasesPaginator(client, &kms.ListAliasesInput{})
	for page := 0; aliases.HasMorePages(); page++ {
		if page == maxPages {
			return "", fmt.Errorf("the account has more than %d pages of aliases", maxPages)
		}
		answer, err := aliases.NextPage(ctx)
		if err != nil {
			return "", fmt.Errorf("listing aliases: %w", err)
		}
		for _, a := range answer.Aliases {
			if a.AliasName != nil && a.TargetKeyId != nil && strings.HasPrefix(*a.AliasName, "alias/"+name+"-") {
				return "awskms:key-id=" + *a.TargetKeyId, nil
			}
		}
	}
	all := kms.NewListKeysPaginator(client, &kms.ListKeysInput{})
	for page := 0; all.HasMorePages(); page++ {
		if page == maxPages {
			return "", fmt.Errorf("the account has more than %d pages of keys", maxPages)
		}
		answer, err := all.NextPage(ctx)
		if err != nil {
			return "", fmt.Errorf("listing keys: %w", err)
		}
		for _, k := range answer.Keys {
			one, err := client.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: k.KeyId})
			if err != nil {
				return "", fmt.Errorf("describing a key: %w", err)
			}
			if m := one.KeyMetadata; m != nil && m.Description != nil && *m.Description == name && m.KeyId != nil && m.Enabled {
				return "awskms:key-id=" + *m.KeyId, nil
			}
		}
	}
	return "", keys.ErrNoKey
}

// awsClient makes a client as the driver does, from the same attributes of the URI and the same environment.
func awsClient(ctx context.Context, attribute func(string) string) (*kms.Client, error) {
	var options []func(*config.LoadOptions) error
	if v := attribute("profile"); v != "" {
		options = append(options, config.WithSharedConfigProfile(v))
	}
	if v := attribute("region"); v != "" {
		options = append(options, config.WithRegion(v))
	}
	if v := attribute("credentials-file"); v != "" {
		options = append(options, config.WithSharedConfigFiles([]string{v}))
	}
	c, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("loading the AWS configuration: %w", err)
	}
	return kms.NewFromConfig(c), nil
}
