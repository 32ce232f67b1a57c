package statmount

var MakeRequest = makeRequest
