-- Draws the analyzer of each record: 10, 40, 20 and 30 of a hundred. rewrite_tag then routes by it.
function draw(tag, timestamp, record)
    local number = math.random(100)
    if number <= 10 then
        record["analyzer"] = "A1"
    elseif number <= 50 then
        record["analyzer"] = "A2"
    elseif number <= 70 then
        record["analyzer"] = "A3"
    else
        record["analyzer"] = "A4"
    end
    return 2, timestamp, record
end
